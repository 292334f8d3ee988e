"""What the official client gets: its own types, and the tokens that one device draws."""

import json
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import reference
import zoo
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from program import ServerProgram, wait_until
from transformers import PreTrainedTokenizerBase

import longspan

NEW = 24
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": NEW, "extra_body": {"ignore_eos": True}}
PROMPT = "The import system"
MESSAGES: list[Any] = [{"role": "user", "content": "Say something about lists."}]
LONG = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProgram]:
    folder = tmp_path_factory.mktemp("server")
    arguments = ("--served-model-name", "tiny", "--heartbeat-interval", "0.05")
    server = ServerProgram(model, folder, *arguments)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def client(server: ServerProgram) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def expected(model: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """What one device says after PROMPT."""
    return tokenizer.decode(
        reference.greedy(reference.load(model), tokenizer.encode(PROMPT), NEW),
        skip_special_tokens=True,
    )


def valid(answer: Any) -> Any:
    """The answer, which its type takes strictly as it is."""
    type(answer).model_validate(answer.model_dump(warnings="error"), strict=True)
    return answer


def test_completions_are_those_of_one_device(
    client: openai.OpenAI, expected: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    answer = valid(client.completions.create(model="tiny", prompt=PROMPT, **GREEDY))
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (expected, "length", 0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert answer.usage.completion_tokens == NEW
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + NEW
    assert (answer.model, answer.object) == ("tiny", "text_completion")
    assert answer.id.startswith("cmpl-")


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI, expected: str) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(model="tiny", prompt=PROMPT, **options, **GREEDY))
    *parts, last = chunks
    valid(parts[-1])  # the type has no null for the finish reason of the others, which OpenAI sends
    assert "".join(part.choices[0].text for part in parts) == expected
    assert len(parts) > NEW / 2
    assert [part.choices[0].finish_reason for part in parts[-2:]] == [None, "length"]
    assert all(part.usage is None for part in parts)
    assert last.choices == []
    assert last.usage.completion_tokens == NEW


def test_prompts_of_every_form(
    client: openai.OpenAI, expected: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer.encode(PROMPT)
    for prompt in (ids, [PROMPT, PROMPT], [ids, ids]):
        answer = valid(client.completions.create(model="tiny", prompt=prompt, **GREEDY))
        count = 1 if prompt is ids else 2
        assert [choice.index for choice in answer.choices] == list(range(count))
        assert [choice.text for choice in answer.choices] == [expected] * count
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == count * len(ids)
    streamed: defaultdict[int, str] = defaultdict(str)
    for chunk in client.completions.create(
        model="tiny", prompt=[PROMPT, "x"], stream=True, **GREEDY
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed[0] == expected
    assert sorted(streamed) == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before(
    client: openai.OpenAI, expected: str, tokenizer: PreTrainedTokenizerBase, stream: bool
) -> None:
    prompts = [tokenizer.encode(PROMPT)]
    answer = client.completions.create(
        model="tiny", prompt=prompts, echo=True, stream=stream, **GREEDY
    )
    answers = [answer] if isinstance(answer, Completion) else answer
    assert "".join(one.choices[0].text for one in answers) == PROMPT + expected


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    whole = valid(client.completions.create(model="tiny", prompt=PROMPT, logprobs=3, **GREEDY))
    said = whole.choices[0].logprobs
    assert len(said.tokens) == len(said.token_logprobs) == len(said.text_offset) == NEW
    for token, logprob, top in zip(
        said.tokens, said.token_logprobs, said.top_logprobs, strict=True
    ):
        assert top[token] == max(top.values()), "greedy draws the likeliest"
        assert logprob <= 0
        assert len(top) <= 3
    streamed = client.completions.create(
        model="tiny", prompt=PROMPT, logprobs=3, stream=True, **GREEDY
    )
    parts = [part.choices[0].logprobs for part in streamed]
    assert [token for part in parts for token in part.tokens] == said.tokens
    assert [offset for part in parts for offset in part.text_offset] == said.text_offset


def test_chat_is_the_template_completed(
    client: openai.OpenAI, tokenizer: PreTrainedTokenizerBase
) -> None:
    answer = valid(client.chat.completions.create(model="tiny", messages=MESSAGES, **GREEDY))
    assert isinstance(answer, ChatCompletion)
    prompt = tokenizer.apply_chat_template(
        MESSAGES, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    plain = client.completions.create(model="tiny", prompt=prompt, **GREEDY)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", plain.choices[0].text)
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)


def test_a_chat_streams_what_it_answers(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, **GREEDY)
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    *parts, last = client.chat.completions.create(
        model="tiny", messages=MESSAGES, **options, **GREEDY
    )
    for part in parts:
        assert isinstance(valid(part), ChatCompletionChunk)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == (
        whole.choices[0].message.content
    )
    assert [part.choices[0].delta.role for part in parts[:2]] == ["assistant", None]
    assert parts[-1].choices[0].finish_reason == "length"
    assert last.usage is not None
    assert last.usage.completion_tokens == NEW


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    answer = valid(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY
        )
    )
    positions = answer.choices[0].logprobs.content
    assert len(positions) == NEW
    for position in positions:
        assert len(position.top_logprobs) == 2
        assert position.token == position.top_logprobs[0].token
        assert bytes(position.bytes).decode() == position.token


def test_n_completions_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "n": 3, "seed": 7}
    first, again = (valid(client.completions.create(**options)) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    assert first.usage is not None
    assert first.usage.completion_tokens <= 36
    options["seed"] = 8
    assert texts != [choice.text for choice in client.completions.create(**options).choices]


def test_a_stop_string_ends_the_text_and_never_leaks(client: openai.OpenAI, expected: str) -> None:
    stop = expected[5:9]
    before = expected[: expected.index(stop)]
    whole = client.completions.create(model="tiny", prompt=PROMPT, stop=stop, **GREEDY)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (before, "stop")
    assert whole.choices[0].model_extra == {"stop_reason": stop}
    streamed = client.completions.create(
        model="tiny", prompt=PROMPT, stop=["never said", stop], stream=True, **GREEDY
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == before


def test_characters_are_never_cut(server: ServerProgram, client: openai.OpenAI) -> None:
    """What a stream sends is whole characters, though tokens are bytes."""
    for seed in range(4):
        options: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "seed": seed}
        whole = client.completions.create(**options).choices[0].text
        parts = [c.choices[0].text for c in client.completions.create(stream=True, **options)]
        assert "".join(parts) == whole


def test_vllm_extras(client: openai.OpenAI, expected: str) -> None:
    """Each of these would change the tokens, or be refused, were it not taken."""

    def text(**extra: Any) -> str:
        body = {"ignore_eos": True, **extra}
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=NEW, seed=3, extra_body=body
        )
        return answer.choices[0].text

    free = text()
    assert text(top_k=1) == expected
    assert text(min_p=1.0) == expected
    assert text(repetition_penalty=1.8) != free
    assert text(priority=-1) == free
    assert text(stop_token_ids=[*range(512)], min_tokens=3) != free
    with_ends = text(skip_special_tokens=False, guided_json=None)
    assert with_ends.replace(zoo.END, "") == free != with_ends


def test_tools_and_template_options_reach_the_template(client: openai.OpenAI) -> None:
    """The test's template knows neither, and takes both."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    answer = client.chat.completions.create(
        model="tiny",
        messages=[*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "So"}]}],
        tools=[tool],  # type: ignore[list-item]
        max_completion_tokens=3,
        extra_body={"chat_template_kwargs": {"x": 1}, "continue_final_message": True},
    )
    assert answer.choices[0].message.content is not None


def test_a_second_prompt_that_begins_alike_is_cached(
    server: ServerProgram, client: openai.OpenAI
) -> None:
    prompt = "About caches. " * 20
    first, second = (
        client.completions.create(model="tiny", prompt=prompt, max_tokens=2, temperature=0)
        for _ in range(2)
    )
    assert first.usage is not None
    assert second.usage is not None
    assert first.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert second.usage.prompt_tokens - 16 <= cached < second.usage.prompt_tokens
    assert first.choices == second.choices
    assert server.figure("vllm:prefix_cache_hits_total") >= cached


def test_models(server: ServerProgram, client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, valid(client.models.retrieve("tiny"))) == ("tiny", model)
    assert model.model_dump()["max_model_len"] == 8000


def test_tokenize_and_back(server: ServerProgram, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode(PROMPT)
    said = server.http.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert (said["tokens"], said["count"], said["max_model_len"]) == (ids, len(ids), 8000)
    assert said["token_strs"] == tokenizer.convert_ids_to_tokens(ids)
    assert server.http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": PROMPT}
    chat = server.http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert chat["tokens"] == tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )


def test_a_long_prefill_has_heartbeats_and_shows_its_progress(server: ServerProgram) -> None:
    body = {"prompt": [7] * 6000, "max_tokens": 2, "stream": True, "temperature": 0}
    events: list[dict[str, Any]] = []
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        name = answer.headers["x-request-id"]
        with server.http.stream("GET", f"/v1/requests/{name}/progress") as progress:
            for line in progress.iter_lines():
                if line.startswith("data: {"):
                    events.append(json.loads(line.removeprefix("data: ")))
        lines = list(answer.iter_lines())
    assert any(line.startswith(":") for line in lines), "heartbeats"
    assert lines[-2:] == ["data: [DONE]", ""]
    assert events[-1]["state"] == "finished"
    assert events[0]["prompt_tokens"] == 6000
    amounts = [event["prefilled_tokens"] for event in events[:-1]]
    assert amounts == sorted(amounts)
    prefill = [event for event in events if event["state"] == "prefill" and event["ranks"]]
    assert prefill[-1]["ranks"] == [0, 1], "one rank could not hold it"
    assert server.http.get(f"/v1/requests/{name}/progress").status_code == 404
    line = next(line for line in server.said.splitlines() if name in line)
    for said in ("prompt_tokens=6000", "output_tokens=2", "degree=2", "holders=2", "finish=length"):
        assert said in line, line


def test_who_goes_away_frees_all_pages(server: ServerProgram, client: openai.OpenAI) -> None:
    """In a prefill and while decoding, streaming or not; others get what they would have."""
    undisturbed = client.completions.create(model="tiny", prompt=PROMPT, **GREEDY).choices[0].text
    for prompt in ("x", [9] * 3000):
        stream = client.completions.create(model="tiny", prompt=prompt, stream=True, **LONG)
        if prompt == "x":
            next(iter(stream))
        else:
            wait_until(lambda: server.figure("vllm:num_requests_running") > 0, "its start")
        other = client.completions.create(model="tiny", prompt=PROMPT, **GREEDY)
        stream.close()
        server.wait_until_idle()
        assert other.choices[0].text == undisturbed
    with server.client(timeout=0.5) as impatient, pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model="tiny", prompt="y", **LONG)
    server.wait_until_idle()
    assert server.figure("vllm:num_requests_running") == 0
    assert "finish=gone" in server.said


def test_a_crowd_that_goes_away_at_random_frees_all_pages(
    server: ServerProgram, client: openai.OpenAI
) -> None:
    """In the queue, in prefills on one rank and on both, and while decoding."""
    chance = random.Random(3)
    stays = {"model": "tiny", "prompt": "Who stays", "temperature": 0, "max_tokens": 60}
    undisturbed = client.completions.create(**stays).choices

    def guest(number: int, length: int, late: float, patience: float) -> None:
        time.sleep(late)
        body = {"prompt": [number] * length, "max_tokens": 900, "ignore_eos": True}
        with (
            suppress(httpx.TimeoutException),
            httpx.Client(base_url=server.url, timeout=patience) as http,
        ):
            if number % 2:
                http.post("/v1/completions", json=body)
            else:
                with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as news:
                    for _ in zip(range(number // 2), news.iter_raw(), strict=False):
                        pass

    with ThreadPoolExecutor(50) as guests:
        going = [
            guests.submit(
                guest,
                number,
                chance.choice([3, 300, 2000, 6000]),
                chance.uniform(0, 1),
                chance.uniform(0.1, 1),
            )
            for number in range(50)
        ]
        assert client.completions.create(**stays).choices == undisturbed
        for one in going:
            one.result()
    server.wait_until_idle()
    assert client.completions.create(**stays).choices == undisturbed


def test_an_idle_engine_does_not_spin(server: ServerProgram) -> None:
    """What it does while nobody asks is far less than a core's work."""
    server.wait_until_idle()
    processes = [psutil.Process(server.process.pid), *map(psutil.Process, server.rank_pids())]

    def seconds() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    before = seconds()
    with pytest.raises(AssertionError):
        wait_until(lambda: False, "two seconds", 2)
    assert seconds() - before < 1


def test_the_small_endpoints(server: ServerProgram) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/version").json() == {"version": longspan.__version__}
    assert server.http.get("/docs").status_code == 200
    assert "/v1/chat/completions" in server.http.get("/openapi.json").json()["paths"]
    figures = server.http.get("/metrics").text
    for name in ("vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_bucket"):
        assert f"{name}{{" in figures
    assert server.figure("vllm:request_success_total") > 10


def test_the_log_has_no_prompts(server: ServerProgram) -> None:
    assert PROMPT not in server.said
    for word in ("model ", "KV capacity      8,000 tokens: 2 x 4,000", "longest context  8,000"):
        assert word in server.said


def test_a_rank_that_is_killed_idle(server: ServerProgram) -> None:
    """Noticed without a request; the server's end by Ctrl-C is in order all the same."""
    assert server.http.get("/health").status_code == 200
    pids = server.rank_pids()
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: server.http.get("/health").status_code == 503, "health to fail", 10)
    assert f"rank 0 (pid {pids[0]}) was killed by SIGKILL" in server.http.get("/health").text
    server.process.send_signal(signal.SIGINT)
    assert server.end() == 130, server.said
    assert server.said.rstrip().endswith("interrupted")
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), f"the end of {pids}", 10)
