"""Examples of bench_gateway, at the smallest size."""

import bench_gateway

globals().update({name: value for name, value in vars(bench_gateway).items() if not name.startswith("__")})


def test_examples():
    request = call_of(8)
    assert job_of(8)[:2] == ("bench-1", "relevance") and call_of(8).messages == request.messages != call_of(9).messages
    len(request.messages[0]["content"])
    small = [throughput(name, 64, 16, 0.02) for name in CLIENTS]
    assert all(
        row["calls"] == 64 and 0 < row["share of ideal %"] <= 100 and row["most in flight"] <= 16 for row in small
    )
    killed = kill_run(200, 2, 16)
    assert (
        killed["kills after which a kept call was asked"] == killed["answered 0.5 s before a kill and lost"] == 0
        and killed["rows equal an unbroken run's"]
    )
    assert (
        killed["asked twice"] <= 2 * 2 * 16 and len(memory(40, 8)["trace"]) == 1
    )  # in flight at a kill, or on their way to the disk
