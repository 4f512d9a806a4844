"""What the machine does when it only multiplies matrices: square ones, and those of the models' layers."""

from __future__ import annotations

import sys

from bench import given, keep
from shares import peak_rate, shape_rates
from psycopref.models.weights import find_weights, load_causal_lm


def machine_bench(backbone: str, dtype: str, rows: list[int]) -> dict:
    "Measure products in the dtype that is used, in GFLOP/s. rows: tokens that are multiplied together."
    model = load_causal_lm(find_weights(backbone), dtype)
    name = str(model.dtype).removeprefix("torch.")
    found = {"square": peak_rate(model.dtype) / 1e9, "rows": shape_rates(model, rows), "dtype": name}
    return keep("machine", found, f"matrix products in {name}: square, and of the layers of {backbone}", "GFLOP/s")


BACKBONE = "smollm2-135m"  # weights of `models.weights`
DTYPE = "auto"  # auto, float32 or bfloat16
ROWS = [8, 32, 128, 1024]  # tokens in a product


if __name__ == "__main__":
    import pandas as pd

    globals().update(given(sys.argv[1:], globals()))
    found = machine_bench(BACKBONE, DTYPE, ROWS)
    print(f"{found['device']}, {found['dtype']}: {found['square']:.0f} GFLOP/s of square products; of the layers':")
    print(pd.DataFrame(found["rows"]).round().to_string(index=False))
