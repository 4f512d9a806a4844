"""One reader of what models say, whoever brings it; failures that concern every call; who answered, and how long."""

import json
from dataclasses import replace

import pytest

from psycopref.core.settings import StudyError
from psycopref.feedback.rating import check_coverage
from psycopref.gateway.cache import ReplyCache
from psycopref.gateway.gateway import Gateway, chat_model, same_model
from psycopref.gateway.servers import completion_reader, read_completion
from psycopref.models.chat import ChatReply, Failure, FreeModel, how_ended, read_answer, with_words, without_reasoning
from psycopref.models.generation import Decoding, Sample
from psycopref.training.sampling import read_sample

from raw_server import answer, ask, error, open_model, said
from refusals import one_line

# ---- reasoning, ends, emptiness ----

REASONED = [  # a reply that holds "Well?" as its answer
    "<think>a</think>Well?",
    "<think>\n\n</think>\n\nWell?",
    "<THINK>a</THINK>Well?",
    '<thinking>{"a": 1}</thinking> Well?',
    "<think>I would write <think> here</think>Well?",
    "<think>a</think><think>b</think>Well?",
    "a 5 of 5</think>\nWell?",
    "[THINK]a[/THINK]Well?",
    "◁think▷a◁/think▷Well?",
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>Well?",
    "<reasoning>a</reasoning>Well?",
    "Well?<think>as an afterthought</think>",
    "<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>Well?<|END_RESPONSE|>",
    "< think >a</ think >Well?",
    "<analysis>a</analysis><answer>Well?</answer>",
    "<scratchpad>5</scratchpad>\n<|begin_of_solution|>Well?<|end_of_solution|>",
    "<unused94>thought a<unused95>Well?",
    "<longcat_think>a</longcat_think>Well?",
    "assistantanalysis a assistantfinal Well?",
    "<answer>Well?</answer>",
    "Well?<|return|>",
]
NO_ANSWER = ["<think>", "<think>a", "[THINK]a 5 of 5", "Well?<think>and", "<think>a</think>", "<think>a</think> … "]


@pytest.mark.parametrize("text", REASONED)
def test_reasoning_is_taken_off_whatever_its_marks(text):
    assert read_answer(text) == ChatReply("Well?")
    assert read_sample(Sample(text, "stop", 9)) == Sample("Well?", "stop", 9)
    body = json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": text}}]}).encode()
    assert read_completion(completion_reader(), body) == ChatReply("Well?")


@pytest.mark.parametrize("text", NO_ANSWER)
def test_reasoning_alone_is_no_answer(text):
    assert (
        isinstance(with_words(read_answer(text, "length")), Failure)
        and read_sample(Sample(text, "length", 9)).text == ""
    )


@pytest.mark.parametrize("prompt", ["<|assistant|><think>", "<|assistant|>\n<think>\n", "…[THINK]"])
def test_a_template_may_open_the_reasoning(prompt):
    assert without_reasoning("a</think>Well?", prompt) == "Well?"
    assert without_reasoning("a, and cut", prompt) is None and without_reasoning("Well?", "user: <think> no") == "Well?"


@pytest.mark.parametrize(
    "text",
    [
        "I think < you > are right.",
        "Use <b>this</b>.",
        "Thinking is hard.",
        " kept as it is ",
        "Close it by </thinking>.",
        "</reflection> and </analysis> are tags.",
        "Your final answer?",
        "an assistantfinal word",
    ],  # fmt: skip
)
def test_other_texts_stay_as_they_are(text):
    assert read_answer(text).text == text


@pytest.mark.parametrize(
    "text", ["", " ", "\n\t", "\u200b\u2060", "…", "***", "-", "\ufeff", "😀", None, "\u3164\u115f", "\uffa0"]
)
def test_what_holds_no_word_is_no_answer(text):
    found = with_words(read_answer(text))
    assert isinstance(found, Failure) and not found.again and read_sample(Sample(text or "", "stop", 1)).text == ""


ENDS = {"stop": "stop end_turn EOS_TOKEN STOP FinishReason.STOP stop_sequence".split() + [None, ""]}
ENDS |= {"length": "length MAX_TOKENS max_output_tokens model_length FinishReason.MAX_TOKENS".split()}
ENDS |= {None: "content_filter SAFETY tool_calls function_call error abort refusal RECITATION unknown 7".split()}


@pytest.mark.parametrize("end", ENDS)
def test_the_list_of_ends_is_closed(end):
    assert {how_ended(word) for word in ENDS[end]} == {end}
    for word in ENDS[end]:
        found = read_answer("Well?", word)
        assert found == ChatReply("Well?", end) if end else isinstance(found, Failure) and str(word) in found.reason
    assert read_answer("Well?", "error").again and not read_answer("Well?", "SAFETY").again


class Says(FreeModel):
    """A model of ours that says one thing."""

    uri = label = identity = "says"

    def __init__(self, text, reason="stop"):
        self.reply = ChatReply(text, reason)

    async def answer(self, requests):
        return [self.reply for _ in requests]


@pytest.mark.parametrize("text", [*REASONED[:4], *NO_ANSWER[:3], " \n"])
def test_the_gateway_reads_whoever_answers_and_what_it_kept_before(gateway, text):
    [found] = gateway.ask(Says(text), [ask()])
    assert type(found) is type(with_words(read_answer(text))) and getattr(found, "text", "Well?") == "Well?"
    older = Gateway(ReplyCache(gateway.cache.path.with_name("older.sqlite")))
    older.cache.put({ask().key("says"): ChatReply(text)})  # as a version before this one kept it
    [kept] = older.ask(Says("Well?"), [ask()])
    assert kept == ChatReply("Well?")
    assert older.counts["says"]["calls"] == isinstance(found, Failure), "what is no answer is asked again"


@pytest.mark.parametrize(
    "task, kind", [("respond", Failure), ("rate", ChatReply), ("rank", ChatReply), ("battle", ChatReply)]
)
def test_a_verdict_without_a_word_is_a_reply_that_its_reader_counts(gateway, task, kind):
    "Local weights say the same when asked again; what they said is kept, so that a run can be replayed."
    asked = replace(ask(), task=task)
    [found] = gateway.ask(Says("?!"), [asked])
    assert type(found) is kind
    replayed = Gateway(gateway.cache, calls="replay")
    assert task == "respond" or replayed.ask(Says("1"), [asked]) == [ChatReply("?!")]


# ---- what concerns every call ----

ALL_ALIKE = [
    (400, "Unsupported value: 'temperature' does not support 0.0"),
    (422, "max_completion_tokens: extra fields not permitted"),
    (413, "too large"),
    (400, "model is not multimodal, request 7f3a99 of 2026"),
    (405, "method"),
    (400, "no, see req_63d2e3da8688 and 0af7651916cd43dd8448eb211c80319c"),
]


@pytest.mark.parametrize("status, words", ALL_ALIKE)
def test_the_same_refusal_of_all_first_calls_stops_the_run(server, gateway, status, words):
    server.behave = lambda text, attempt: error(status, f"{words} (request {len(server.log)})")
    message = one_line(lambda: gateway.ask(open_model(server, concurrency=4), [ask(str(n)) for n in range(300)]))
    assert "failed alike" in message and words[:20] in message and len(server.log) < 40, "of three hundred"


def test_two_causes_in_turn_stop_the_run_too(server, gateway):
    server.behave = lambda text, attempt: error(400, "no temperature") if int(text) % 2 else error(422, "no top_p")
    message = one_line(lambda: gateway.ask(open_model(server, concurrency=4), [ask(str(n)) for n in range(300)]))
    assert "for 2 reasons" in message and len(server.log) < 60


ERRORS = [
    ({"message": "Insufficient credits", "code": 402}, "Insufficient credits"),
    ("out of memory", "out of memory"),
]
ERRORS += [({"message": "not found", "type": "x"}, "not found")]


@pytest.mark.parametrize("fault, words", ERRORS)
def test_an_error_with_status_200_is_read_and_concerns_all(server, gateway, fault, words):
    server.behave = lambda text, attempt: answer(json.dumps({"error": fault}).encode())
    message = one_line(lambda: gateway.ask(open_model(server, concurrency=4), [ask(str(n)) for n in range(300)]))
    assert words in message and len(server.log) < 60, "asked once each"


def test_a_web_page_may_pass_and_is_named(server, gateway):
    server.behave = lambda text, attempt: answer(b"<!doctype html><title>Welcome</title>")
    [found] = gateway.ask(open_model(server, attempts=2), [ask()])
    assert "/v1 may be missing" in found.reason and len(server.log) == 2


def test_refusals_among_answers_stop_nothing(server, gateway):
    server.behave = lambda text, attempt: answer(said()) if int(text) % 10 == 0 else error(400, "no")
    found = gateway.ask(open_model(server, concurrency=1), [ask(str(n)) for n in range(60)])
    assert sum(isinstance(reply, ChatReply) for reply in found) == 6


def test_an_account_that_owes_stops_the_run_at_once(server, gateway):
    server.behave = lambda text, attempt: error(402, "Insufficient Balance")
    message = one_line(lambda: gateway.ask(open_model(server, concurrency=2), [ask(str(n)) for n in range(300)]))
    assert "402" in message and "the account is empty" in message and "Insufficient Balance" in message
    assert len(server.log) <= 4


def test_a_coverage_error_names_the_commonest_reason():
    reasons = ["422: no temperature"] * 3 + ["500: oops"]
    line = one_line(lambda: check_coverage(6, 10, 0.9, "03_ratings", reasons=iter(reasons)))
    assert "most often (3 times): 422: no temperature" in line


# ---- where a server lies, who answered, how long ----

PLACES = [("", True), ("/v1", False), ("/v1/", False), ("/api/v3", False), ("/openai/v1beta", False), ("/chat", True)]


@pytest.mark.parametrize("path, bare", PLACES)
def test_a_missing_version_is_named(server, gateway, path, bare):
    server.behave = lambda text, attempt: error(404)
    model = chat_model(f"openai:m@http://127.0.0.1:{server.port}{path}", max_retries=0, timeout=5)
    assert ("/v1 may be missing" in one_line(lambda: gateway.ask(model, [ask()]))) == bare


@pytest.mark.parametrize(
    "place",
    [
        "ftp://h/v1",
        "127.0.0.1:8000/v1",
        "http://h:99999/v1",
        "http://[::1/v1",
        "http://a b/v1",
        "http://h:0/v1",
        "http://a..b/v1",
        "http://x\\y/v1",
        "http://h\x07/v1",
        "http://h/v1/chat/completions",
    ],  # fmt: skip
)
def test_an_address_that_is_none_is_no_call(place, monkeypatch):
    assert "expected an address" in one_line(lambda: chat_model(f"openai:m@{place}"))
    monkeypatch.setenv("OPENAI_BASE_URL", place)
    assert "OPENAI_BASE_URL is" in one_line(lambda: chat_model("openai:gpt-4o-mini"))


def test_a_password_in_an_address_is_refused_and_not_shown(monkeypatch):
    for line in (
        one_line(lambda: chat_model("openai:m@http://ann:top-secret@127.0.0.1:1/v1")),
        one_line(
            lambda: (
                monkeypatch.setenv("OPENAI_BASE_URL", "https://ann:top-secret@h/v1") or chat_model("openai:gpt-4o-mini")
            )
        ),
    ):
        assert "belong into a key" in line and "top-secret" not in line


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-ä", "sk a", "sk-\u200b1"])
def test_a_key_that_is_none_is_no_call(server, gateway, monkeypatch, key):
    monkeypatch.setenv("PSYCOPREF_SERVER_KEY", key)
    line = one_line(lambda: gateway.ask(open_model(server), [ask()]))
    assert "PSYCOPREF_SERVER_KEY" in line and key not in line and not server.log


def test_a_price_holds_by_whatever_address():
    plain, spelled = chat_model("openai:gpt-4o-mini"), chat_model("openai:gpt-4o-mini@https://api.openai.com/v1")
    assert plain.price == spelled.price and spelled.most(ask()) > 0
    assert "no price" in one_line(lambda: chat_model("openai:gpt-99@https://eu.api.openai.com/v1"))


SAME = [
    ("gpt-4o", "gpt-4o-2024-08-06"),
    ("meta/Llama-3", "llama-3"),
    ("m", "m:latest"),
    ("qwen3", "Qwen3-FP8"),
    ("m", ""),
]
OTHER = [
    ("gpt-4o", "gpt-4o-mini"),
    ("gpt-4o-2024-08-06", "gpt-4"),
    ("m", "mixtral"),
    ("qwen3", "qwen3guard-0.6b"),
    ("a", "b"),
]


@pytest.mark.parametrize("asked, named", SAME + OTHER)
def test_a_name_says_who_answered(asked, named):
    assert same_model(asked, named) == ((asked, named) in SAME)


def test_another_server_in_openai_s_place_stands_in_label_and_identity(server, gateway, monkeypatch):
    usual = chat_model("openai:gpt-4o-mini")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.port}/v1/")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-test")
    other = chat_model("openai:gpt-4o-mini")
    assert str(server.port) in other.label and str(server.port) in other.identity and other.identity != usual.identity
    assert other.price == usual.price and other.retires is None, "a budget holds there too; OpenAI's days do not"
    assert isinstance(Gateway(gateway.cache, 1.0).ask(other, [ask()])[0], ChatReply)
    monkeypatch.setenv("OPENAI_BASE_URL", "https://eu.api.openai.com/v1")
    assert chat_model("openai:gpt-4o-mini").identity == usual.identity


def test_a_reply_of_another_model_is_counted_and_said(server, gateway, capfd):
    server.behave = lambda text, attempt: answer(said(model=text))
    names = ["some/model", "model-2024-07-18", "llama", "llama", "MODEL"]
    gateway.ask(chat_model(f"openai:some/model@http://127.0.0.1:{server.port}/v1"), [ask(name) for name in names])
    [count] = gateway.counts.values()
    assert count["answered_by"] == {"llama": 1} and "'llama' answered" in capfd.readouterr().err, (
        "a call asked twice is one"
    )
    pool = type("Member", (), {"model": chat_model("openai:gpt-4o-mini")})()
    assert same_model(pool, "gpt-4o-mini-2024-07-18") and not same_model(pool, "gpt-3") and same_model(pool, "")


LONG = [("a " * 9, (5, 9), True), ("a " * 10, (5, 10), True), ("a " * 30, (5, 30), False)]
LONG += [("a " * 30, None, False), ("a " * 8, None, True), ("a", (5, 400), False)]


@pytest.mark.parametrize("text, usage, whole", LONG)
def test_an_answer_beyond_what_was_asked_is_refused(server, gateway, text, usage, whole):
    server.behave = lambda question, attempt: answer(said(text, usage=usage))
    [found] = gateway.ask(open_model(server), [ask(decoding=Decoding(10))])
    assert isinstance(found, ChatReply) if whole else "no such limit" in found.reason
    assert server.bodies[-1]["max_tokens"] == server.bodies[-1]["max_completion_tokens"] == 10


def test_a_model_that_thinks_has_room_and_no_temperature(server, gateway):
    server.behave = lambda text, attempt: answer(said("fine", usage=(5, 600)))
    uri = f"openai:m@http://127.0.0.1:{server.port}/v1?thinking=1000&temperature=none"
    [found] = gateway.ask(chat_model(uri), [ask(decoding=Decoding(10))])
    assert found.text == "fine" and server.bodies[-1]["max_completion_tokens"] == 1010
    assert not {"temperature", "top_p"} & {*server.bodies[-1]}
    paid, plain = chat_model("openai:gpt-4o-mini?thinking=1000"), chat_model("openai:gpt-4o-mini")
    assert paid.price == plain.price and paid.most(ask()) > plain.most(ask()) and paid.identity != plain.identity
    for wrong in ("thinking=1&thinking=9", "thinking=many", "thinking=-1", "temperature=0", "speed=1", "x", "thinking"):
        assert "expected ?thinking" in one_line(lambda: chat_model(f"openai:gpt-4o-mini?{wrong}"))


def test_no_way_around_a_study_error():
    assert str(StudyError("two\nlines")) == "two lines"
