"""Send rating prompts through a distilabel pipeline and say how long it took: BASE_URL PROMPTS.jsonl CONCURRENCY."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DISTILABEL_LOG_LEVEL": "ERROR",
}  # read by the imports below

from datasets import Dataset
from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps.tasks import ChatGeneration
from timing import report


def rate(base_url: str, prompts: list, concurrency: int, cache: str) -> list:
    """Return the replies, None where there is none; a batch is sent at once, so its size is the number of calls in
    flight."""
    with Pipeline("rating", cache_dir=cache) as pipeline:
        llm = OpenAILLM(
            model="any",
            base_url=base_url,
            api_key="none",
            generation_kwargs={"temperature": 0.0, "max_new_tokens": 1024},
        )
        ChatGeneration(llm=llm, input_batch_size=concurrency, add_raw_input=False, add_raw_output=False)
    done = pipeline.run(dataset=Dataset.from_list([{"messages": messages} for messages in prompts]), use_cache=False)
    return done["default"]["train"]["generation"]


if __name__ == "__main__":
    report(rate)
