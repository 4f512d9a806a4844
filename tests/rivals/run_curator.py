"""Send rating prompts through Bespoke Curator and say how long it took: BASE_URL PROMPTS.jsonl CONCURRENCY."""

import importlib.util
import os
from pathlib import Path

TOKENIZERS = (
    Path(importlib.util.find_spec("litellm").origin).parent / "litellm_core_utils" / "tokenizers"
)  # tiktoken's files, or it would download them
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "TELEMETRY_ENABLED": "false",
    "CURATOR_VIEWER": "0",
    "CURATOR_DISABLE_RICH_DISPLAY": "1",
    "TIKTOKEN_CACHE_DIR": str(TOKENIZERS),
}  # read by the imports below

from bespokelabs import curator
from datasets import Dataset
from timing import report

UNLIMITED = 10**9  # requests and tokens a minute: only the number in flight shall hold it back


class Rater(curator.LLM):
    """Ask with the row's messages, keep the text."""

    def prompt(self, row):
        return row["messages"]

    def parse(self, row, reply):
        return {"reply": reply}


def rate(base_url: str, prompts: list, concurrency: int, cache: str) -> list:
    """Return the replies, None where there is none."""
    limits = {
        "max_concurrent_requests": concurrency,
        "max_requests_per_minute": UNLIMITED,
        "max_tokens_per_minute": UNLIMITED,
    }
    rater = Rater(
        model_name="any",
        backend="openai",
        backend_params={"base_url": base_url, "api_key": "none", "require_all_responses": False, **limits},
        generation_params={"temperature": 0.0, "max_tokens": 1024},
    )
    done = rater(Dataset.from_list([{"messages": messages} for messages in prompts]), working_dir=cache)
    return getattr(done, "dataset", done)["reply"]


if __name__ == "__main__":
    report(rate)
