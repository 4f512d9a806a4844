"""Examples of bench, at the smallest size."""

import bench

globals().update({name: value for name, value in vars(bench).items() if not name.startswith("__")})


def test_examples():
    order = []
    rates = in_turn({"one": lambda: order.append(1) or 5, "two": lambda: order.append(2) or 7}, rounds=2)
    assert order == [1, 2, 1, 2, 1, 2] and list(map(len, rates.values())) == [2, 2]
    import os
    from unittest.mock import patch

    with patch.dict(os.environ, PSYCOPREF_ROOT=tempfile.mkdtemp()):  # the example writes elsewhere
        found = side_by_side(
            "example", "sleeping", "naps/s", lambda: time.sleep(0.01) or 1, lambda: time.sleep(0.03) or 1, rounds=2
        )
        assert (
            found["ratio"] > 1
            and found["unit"] == "naps/s"
            and (project_root() / "outputs/bench/example.json").is_file()
        )
    few = mixed_speeches(300)
    assert len(few) == 300 and few == mixed_speeches(300) and sum(text.startswith("Hello, thanks") for text in few) > 10
    round(sum(map(len, few)) / 300)
