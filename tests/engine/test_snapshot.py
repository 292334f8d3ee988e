"""What watchers are told agrees with what the engine has and has done."""

from simulated import simulated_engine

from longspan.engine.engine import Engine
from longspan.engine.snapshot import RequestView, Snapshot
from longspan.sampling_params import SamplingParams


def by_id(engine: Engine) -> dict[str, RequestView]:
    return {view.id: view for view in Snapshot.of(engine).requests}


def test_a_long_prompt_beside_a_short_one() -> None:
    """One lies across the ranks and says how it is computed, the other on a rank of its own."""
    engine, executor = simulated_engine(
        [100, 100], max_num_batched_tokens=64, min_tokens_per_rank=100, attention_strategy="pass_q"
    )
    seen: list[dict[str, RequestView]] = []
    executor.before_step = lambda plans: seen.append(by_id(engine))
    engine.add_request([2] * 500, SamplingParams(max_tokens=3, ignore_eos=True), request_id="long")
    engine.add_request([3] * 20, SamplingParams(max_tokens=20, ignore_eos=True), request_id="short")
    while engine.has_requests:
        engine.step()
        snapshot = Snapshot.of(engine)
        for rank, view in enumerate(snapshot.ranks):
            held = sum(request.pages[rank] for request in snapshot.requests)
            assert (view.used, view.total, view.cached) == (held, 100, 0)
    long = [views["long/0"] for views in seen if "long/0" in views]
    assert all(view.pages[0] and view.pages[1] for view in long[1:])
    assert {view.strategy for view in long[1:]} == {"pass_q"}
    assert [view.state for view in long[1:]] == ["prefill"] * (len(long) - 3) + ["decode"] * 2
    done = [view.prefilled_tokens for view in long]
    assert done == sorted(done)
    assert done[-1] == 500
    assert long[-1].time_to_first_token is not None
    short = [views["short/0"] for views in seen if "short/0" in views]
    assert all(view.pages.count(0) == 1 for view in short)
    assert {view.strategy for view in short} == {"local"}
    assert all(view.pages[view.home] for view in (*long, *short) if view.home is not None)
    assert (snapshot.prefilled_tokens, snapshot.generated_tokens) == (520, 23)
    assert snapshot.requests == []


def test_cached_pages_are_free_and_shared_ones_are_of_each() -> None:
    engine, _ = simulated_engine([50], enable_prefix_caching=True)
    engine.add_request([5] * 40, SamplingParams(max_tokens=1))
    while engine.has_requests:
        engine.step()
    [rank] = Snapshot.of(engine).ranks
    assert (rank.used, rank.cached, rank.total) == (0, 10, 50)
    for name in ("a", "b"):
        prompt = [*[5] * 40, 6]
        engine.add_request(prompt, SamplingParams(max_tokens=2, ignore_eos=True), request_id=name)
    engine.step()
    snapshot = Snapshot.of(engine)
    assert [view.pages for view in snapshot.requests] == [(11,), (11,)]
    assert [view.cached_tokens for view in snapshot.requests] == [40, 40]
    assert [(rank.used, rank.cached) for rank in snapshot.ranks] == [(12, 0)]
    assert snapshot.prefilled_tokens == 40 + 2, "what is cached has not been computed"
