"""One engine in a process of its own: computes what a line asks for, and answers with a line.

    python engines.py ENGINE MODEL DTYPE POOL_TOKENS MAX_MODEL_LEN

A line in is `{"prompts": [[token, ...], ...], "new_tokens": N}`; a line out has each prompt's
greedy tokens and when each came, in seconds from the start. Longspan and vLLM have their prefix
caches on; transformers keeps the cache of the last single prompt for several that differ from it
in their last token. While nothing is asked, the process sleeps.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Answer = tuple[list[list[int]], list[list[float]]]
"""Of each prompt its new tokens, and when each of them came."""
Run = Callable[[list[list[int]], int], Answer]


class Clock:
    """When tokens come, by request, from now on."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.tokens: dict[int, list[int]] = {}
        self.times: dict[int, list[float]] = {}

    def took(self, index: int, tokens: list[int]) -> None:
        self.tokens.setdefault(index, []).extend(tokens)
        now = time.perf_counter() - self.begun
        self.times.setdefault(index, []).extend([now] * len(tokens))

    def answer(self) -> Answer:
        order = sorted(self.tokens)
        return [self.tokens[i] for i in order], [self.times[i] for i in order]


def with_longspan(ranks: int, model: str, dtype: str, pool: int) -> Run:
    from longspan import LLM, SamplingParams

    llm = LLM(
        model,
        device="cpu",
        dtype=dtype,
        context_parallel_size=ranks,
        kv_cache_tokens=pool // ranks,
    )

    def run(prompts: list[list[int]], new: int) -> Answer:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        clock = Clock()
        for output in llm.stream([{"prompt_token_ids": prompt} for prompt in prompts], params):
            clock.took(output.prompt_index, output.outputs[0].token_ids)
        return clock.answer()

    return run


def with_vllm(model: str, dtype: str, longest: int) -> Run:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(model, dtype=dtype, skip_tokenizer_init=True, max_model_len=longest, seed=0)
    engine = llm.llm_engine

    def run(prompts: list[list[int]], new: int) -> Answer:
        params = SamplingParams(
            temperature=0,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        clock = Clock()
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                clock.took(int(output.request_id), list(output.outputs[0].token_ids))
        return clock.answer()

    return run


def with_transformers(model: str, dtype: str) -> Run:
    import torch
    from transformers import DynamicCache, StoppingCriteria

    lm = _causal_lm(model, dtype, "sdpa")
    kept: dict[str, Any] = {"prompt": [], "cache": None}

    class Watch(StoppingCriteria):
        def __init__(self, batch: int) -> None:
            self.clock = Clock()
            self.going_on = torch.zeros(batch, dtype=torch.bool)

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            for index, token in enumerate(input_ids[:, -1].tolist()):
                self.clock.took(index, [token])
            return self.going_on

    def run(prompts: list[list[int]], new: int) -> Answer:
        beginning = prompts[0][:-1]
        cache = DynamicCache(config=lm.config)
        if len(prompts) > 1 and kept["prompt"][:-1] == beginning:
            cache, kept["prompt"] = kept["cache"], []
            cache.crop(len(beginning) - cache.get_seq_length())  # minus is how many to drop
            cache.batch_repeat_interleave(len(prompts))
        token_ids = torch.tensor(prompts)
        watch = Watch(len(prompts))
        lm.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=new,
            past_key_values=cache,
            stopping_criteria=[watch],
        )
        if len(prompts) == 1:
            kept.update(prompt=prompts[0], cache=cache)
        return watch.clock.answer()

    return run


def with_continuous_batching(model: str, dtype: str, pool: int) -> Run:
    from transformers import ContinuousBatchingConfig

    lm = _causal_lm(model, dtype, "sdpa")
    page = 256
    options = ContinuousBatchingConfig(
        page_size=page, num_blocks=pool // page, max_batch_tokens=512
    )

    def run(prompts: list[list[int]], new: int) -> Answer:
        begun = time.perf_counter()
        outputs = lm.generate_batch(
            prompts,
            max_new_tokens=new,
            continuous_batching_config=options,
            record_timestamps=True,
        )
        ordered = [outputs[name] for name in sorted(outputs, key=lambda n: int(n.split("_")[-1]))]
        times = [[t - begun for t in output.timestamps] for output in ordered]
        return [output.generated_tokens for output in ordered], times

    return run


def _causal_lm(model: str, dtype: str, attention: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    lm = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    lm.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return lm


def made(engine: str, model: str, dtype: str, pool: int, longest: int) -> Run:
    if engine == "vllm":
        return with_vllm(model, dtype, longest)
    if engine == "transformers":
        return with_transformers(model, dtype)
    if engine == "continuous":
        return with_continuous_batching(model, dtype, pool)
    return with_longspan(int(engine.removeprefix("longspan-")), model, dtype, pool)


def main() -> None:
    engine, model, dtype, pool, longest = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    run = made(engine, model, dtype, int(pool), int(longest))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens, times = run(asked["prompts"], asked["new_tokens"])
        print(json.dumps({"tokens": tokens, "times": times}), file=answers, flush=True)
    os._exit(0)  # vLLM's threads and Longspan's ranks end with the process


if __name__ == "__main__":
    main()
