from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loop.kto import attention, logps
from loop.kto.attention import PACKED_ATTENTION
from loop.kto.batch import mismatched_logps, policy_and_mismatched_logps, policy_logps
from loop.kto.pack import Prompted, pack, packs_of
from loop.kto.rows import Row

KINDS = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "granite"]


def plain_logps(model: Any, row: Row) -> Tensor:
    """[length] by Transformers' own forward, the row alone, whole logits."""
    ids = torch.tensor([row.prompt_ids + row.completion_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    found = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return found[len(row.prompt_ids) - 1 :].double()


def lora_gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_log_probs_and_gradients_are_those_of_each_row_alone(
    kind: str, lora_model: Callable[..., Any], make_rows: Callable[..., list[Row]]
) -> None:
    rows = make_rows(6)
    plain = lora_model(kind, "eager")
    expected = torch.stack([plain_logps(plain, row).sum() for row in rows])
    weights = torch.linspace(-1, 1, len(rows))
    (expected * weights).sum().backward()
    expected_gradients = lora_gradients(plain)

    packed = lora_model(kind, PACKED_ATTENTION)
    found = policy_logps(packed, rows)
    (found * weights).sum().backward()
    gradients = lora_gradients(packed)

    assert relative(found, expected) < 1e-5
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) < 1e-5, name


def varlen_by_hand(
    q: Tensor,  # [tokens, heads, head size]
    k: Tensor,
    v: Tensor,
    q_bounds: Tensor,
    k_bounds: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` computes, which there is on CUDA only."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert [longest_q, longest_k] == [int(bounds.diff().max()) for bounds in (q_bounds, k_bounds)]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    (left, right), found = window_size, []
    for q_range, k_range in zip(q_bounds.unfold(0, 2, 1), k_bounds.unfold(0, 2, 1), strict=True):
        queries, keys, values = q[slice(*q_range)], k[slice(*k_range)], v[slice(*k_range)]
        at = torch.arange(len(queries))[:, None] + len(keys) - len(queries)
        apart = at - torch.arange(len(keys))
        is_seen = (apart >= -right) & (apart <= (left if left >= 0 else len(keys)))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * (scale or q.shape[2] ** -0.5)
        weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3"])
def test_one_launch_for_all_segments_gives_what_one_for_each_gives(
    kind: str,
    lora_model: Callable[..., Any],
    make_rows: Callable[..., list[Row]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, rows = lora_model(kind), make_rows(6)
    others = [rows[index - 1].completion_ids for index in range(len(rows))]

    def scored() -> tuple[Tensor, dict[str, Tensor]]:
        own, mismatched = policy_and_mismatched_logps(model, rows, others)
        own.sum().backward()
        return torch.cat([own.detach(), mismatched]), lora_gradients(model)

    expected, expected_gradients = scored()
    launches: list[int] = []
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query: not launches.append(len(query)))
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_hand)
    found, gradients = scored()
    assert launches
    assert relative(found, expected) < 1e-6
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_for_lengths_that_vary_takes_our_call(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own function and its backward, on tensors without data: arguments, shapes and types are right."""
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query: True)
    layout = attention.Layout((attention.Segment(0, 6), attention.Segment(6, 9, ((0, 4),))))
    query, key, value = (
        torch.empty(1, heads, 9, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, 2, 2)
    )
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    out, _ = attention.packed_attention(
        module, query, key, value, None, layout=layout, scaling=0.125, sliding_window=window
    )
    assert (out.shape, out.dtype) == ((1, 9, 4, 64), torch.bfloat16)
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert all(given.grad is not None and given.grad.shape == given.shape for given in (query, key, value))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention's kernels need CUDA")
def test_the_kernel_for_lengths_that_vary_agrees_with_a_launch_for_each(
    lora_model: Callable[..., Any], make_rows: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = lora_model("mistral").to("cuda", torch.bfloat16), make_rows(6)
    at_once = policy_logps(model, rows)
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query: False)
    assert relative(at_once, policy_logps(model, rows)) < 1e-2  # of 8 bits of mantissa


@pytest.mark.parametrize("kind", KINDS)
def test_a_mismatched_pass_that_goes_on_from_kept_keys_equals_a_fresh_one(
    kind: str, lora_model: Callable[..., Any], make_rows: Callable[..., list[Row]]
) -> None:
    model, rows = lora_model(kind), make_rows(6)
    others = [None if index == 2 else rows[index - 1].completion_ids for index in range(len(rows))]
    matched, reused = policy_and_mismatched_logps(model, rows, others)
    assert relative(matched, policy_logps(model, rows)) < 1e-6
    assert relative(reused, mismatched_logps(model, rows, others)) < 1e-5
    assert matched.requires_grad
    assert not reused.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_completions_that_share_a_prompts_computation_score_as_if_separate(
    kind: str, lora_model: Callable[..., Any], make_rows: Callable[..., list[Row]]
) -> None:
    model, rows = lora_model(kind), make_rows(5)
    together = logps.score_all(
        model,
        [Prompted(row.prompt_ids, (row.completion_ids, rows[i - 1].completion_ids)) for i, row in enumerate(rows)],
    )
    for index, row in enumerate(rows):
        alone = logps.score_all(model, [Prompted(row.prompt_ids, (rows[index - 1].completion_ids,))])
        assert together[index][1] == pytest.approx(alone[0][0], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_turns_that_share_a_conversations_computation_are_as_if_separate(
    kind: str, lora_model: Callable[..., Any], make_rows: Callable[..., list[Row]]
) -> None:
    model = lora_model(kind)
    rows = [turn for row in make_rows(3) for turn in conversation_of(row)]
    others = [rows[index - 3].completion_ids for index in range(len(rows))]
    weights = torch.linspace(-1, 1, len(rows))
    alone = torch.cat([policy_logps(model, [row]) for row in rows])
    (alone * weights).sum().backward()
    expected = lora_gradients(model)

    together, reused = policy_and_mismatched_logps(model, rows, others)
    (together * weights).sum().backward()
    gradients = lora_gradients(model)

    assert pack([Prompted(r.prompt_ids, (r.completion_ids,)) for r in rows]).input_ids.numel() < sum(
        row.tokens - 1 for row in rows
    )
    assert relative(together, alone) < 1e-5
    assert relative(reused, mismatched_logps(model, rows, others)) < 1e-5
    for name, gradient in gradients.items():
        assert relative(gradient, expected[name]) < 1e-5, name
    scored = logps.score_all(model, [Prompted(row.prompt_ids, (row.completion_ids,)) for row in rows])
    assert relative(torch.stack([found[0].sum() for found in scored]), alone.detach()) < 1e-5


def conversation_of(row: Row) -> list[Row]:
    """Three turns that begin with the row; the third's template has rewritten the second turn."""
    second = [*row.prompt_ids, *row.completion_ids, 9, 8, 7]
    third = [*row.prompt_ids, *row.completion_ids, 9, 5, 4, 3]
    ids = [(row.prompt_ids, row.completion_ids), (second, [11, 12, 2]), (third, [13, 14, 15, 2])]
    return [replace(row, prompt_ids=prompt, completion_ids=completion) for prompt, completion in ids]


def test_logits_in_chunks_equal_logits_at_once(
    monkeypatch: pytest.MonkeyPatch, lora_model: Callable[..., Any], make_rows: Callable[..., list[Row]]
) -> None:
    model, rows = lora_model("gemma2"), make_rows(6)
    whole = policy_logps(model, rows)
    whole.sum().backward()
    whole_gradients = lora_gradients(model)
    monkeypatch.setattr(logps, "LOGITS_AT_A_TIME", 3 * model.config.vocab_size)
    chunked = policy_logps(model, rows)
    chunked.sum().backward()
    assert relative(chunked, whole) < 1e-6
    for name, gradient in lora_gradients(model).items():
        assert relative(gradient, whole_gradients[name]) < 1e-5, name


def test_no_logits_are_computed_for_prompts(
    lora_model: Callable[..., Any], make_rows: Callable[..., list[Row]]
) -> None:
    model, rows = lora_model(), make_rows(4)
    seen: list[int] = []
    model.get_base_model().lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel() // 32))
    policy_logps(model, rows)
    assert sum(seen) == sum(len(row.completion_ids) for row in rows)


def test_a_pack_has_no_padding_and_computes_a_shared_prompt_once() -> None:
    batch = pack([Prompted([5, 6, 7], ([8, 9], [10, 11, 12])), Prompted([4], ([3],))])
    assert batch.input_ids.tolist() == [5, 6, 7, 10, 11, 8, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0]
    assert batch.targets.tolist() == [8, 9, 10, 11, 12, 3]
    assert batch.scored.tolist() == [2, 5, 2, 3, 4, 6]
    assert batch.lengths.tolist() == [2, 3, 1]


def test_a_conversations_turns_are_one_run_and_a_rewritten_history_branches_off() -> None:
    turns = [Prompted([5, 6], ([7, 8],)), Prompted([5, 6, 7, 8, 9], ([3, 4],)), Prompted([5, 6, 1, 9], ([2],))]
    batch = pack(turns)
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 3, 1, 9]
    assert [(s.start, s.stop, s.context) for s in batch.segments] == [(0, 6, ()), (6, 8, ((0, 2),))]
    assert batch.scored.tolist() == [1, 2, 4, 5, 7]
    assert batch.prompts == (((0, 2),), ((0, 5),), ((0, 2), (6, 8)))


def test_packs_keep_to_their_tokens_and_to_the_order() -> None:
    items = [Prompted([1] * size, ([2],)) for size in (3, 4, 9, 1, 1)]
    assert list(packs_of(items, 7)) == [[0, 1], [2], [3, 4]]


def test_lora_dropout_is_off_while_scoring_and_on_in_training(
    lora_model: Callable[..., Any], make_rows: Callable[..., list[Row]]
) -> None:
    from loop.kto.model import scoring

    model, rows = lora_model(dropout=0.5), make_rows(3)
    with scoring(model, "default"):
        first, second = policy_logps(model, rows), policy_logps(model, rows)
    assert torch.equal(first, second)
    assert not torch.equal(policy_logps(model, rows), policy_logps(model, rows))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_no_gradient(
    checkpointing: bool, lora_model: Callable[..., Any], make_rows: Callable[..., list[Row]]
) -> None:
    model, rows = lora_model(), make_rows(5)
    policy_logps(model, rows).sum().backward()
    expected = lora_gradients(model)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    others = [rows[index - 1].completion_ids for index in range(len(rows))]
    policy_and_mismatched_logps(model, rows, others)[0].sum().backward()
    for name, gradient in lora_gradients(model).items():
        assert relative(gradient, expected[name]) < 1e-5, name
