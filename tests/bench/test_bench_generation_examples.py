"""Examples of bench_generation, at the smallest size."""

import bench_generation

globals().update({name: value for name, value in vars(bench_generation).items() if not name.startswith("__")})


def test_examples():
    work = make_work("random-tiny", 3, Decoding(5, 0.8, 0, 0.95), n=2)
    assert len(work.prompts) == 3 and all(work.ids())
    assert (
        0 < ours(work) <= 30 and 0 < transformers_generate(work, 2) <= 30 and 0 < transformers_generate(work, 64) <= 30
    )
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Five(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = json.dumps(
                {"tokens_predicted": asked["n_predict"], "stop_type": "limit" if asked["seed"] else "eos"}
            ).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments):
            pass

    stub = ThreadingHTTPServer(("127.0.0.1", 0), Five)
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    assert llama_samples(work, f"http://127.0.0.1:{stub.server_port}") == 3 * 2 * 5 - 1  # one ended with an end token
    stub.shutdown()
    try:
        with llama_server("false", Path("none.gguf"), 1, 8):
            raise AssertionError("accepted")
    except StudyError as error:
        assert "exit status 1" in str(error)
    try:
        find_gguf("random-tiny", Path("."))
        raise AssertionError("accepted")
    except StudyError as error:
        print(error)
