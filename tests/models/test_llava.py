"""Splicing, states and LoRA of the language model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from glus.batch import TokenRows
from glus.data.chat.tree import placeholders
from glus.models.glus import Glus
from glus.models.mllm.adapters import add_lora
from glus.models.mllm.decoder import Prefix, PrefixCache
from glus.models.mllm.llava import ClipEncoder, Llava, build_llama, build_projector, build_vision_tower
from glus.tokens import IMAGE_ID

NOTHING = torch.zeros(0, 32)
"""Visual tokens of rows that show none."""


def rows_of(ids: torch.Tensor, start: int = 0, **fields: Any) -> TokenRows:
    """Rows of tokens that are read everywhere, from position ``start`` on."""
    where = torch.from_numpy(placeholders(ids.numpy()))
    positions = torch.arange(start, start + ids.shape[1]).expand_as(ids)
    rows = TokenRows(ids, positions, where, torch.arange(len(where)), torch.arange(ids.numel()))
    return replace(rows, **fields)


def states_of(
    mllm: Llava, rows: TokenRows, visual: torch.Tensor = NOTHING, past: Sequence[Prefix] = ()
) -> torch.Tensor:
    """(B, L, D)."""
    return mllm.states(rows, visual, past)[0].unflatten(0, rows.input_ids_BL.shape)


def prefill(mllm: Llava, ids: torch.Tensor, start: int = 0, past: Sequence[Prefix] = ()) -> Prefix:
    prefix = mllm.states(rows_of(ids, start), NOTHING, past, keep=True)[1]
    assert prefix is not None
    return prefix


ARCHITECTURE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def with_llama(architecture: dict[str, int]) -> Llava:
    clip = ClipEncoder(build_vision_tower(VISION), select_layer=-1, pool=2)
    return Llava(clip, build_projector(16, 32), build_llama(architecture, vocab_size=50)).eval()


@pytest.fixture
def mllm() -> Llava:
    torch.manual_seed(0)
    return with_llama(ARCHITECTURE)


def test_visual_tokens_take_their_placeholders_row_by_row(mllm: Llava) -> None:
    ids = torch.tensor([[1, IMAGE_ID, IMAGE_ID, 5, IMAGE_ID], [IMAGE_ID, 7, 8, 9, 0]])
    visual = torch.arange(4.0)[:, None].expand(4, 32) + 100
    embeds = mllm.decoder.splice(rows_of(ids), visual)
    table = mllm.llama.model.embed_tokens.weight
    assert torch.equal(embeds[ids == IMAGE_ID], visual)
    assert torch.equal(embeds[ids != IMAGE_ID], table[ids[ids != IMAGE_ID]])


def test_gradients_reach_visual_tokens_and_only_the_embeddings_in_use(mllm: Llava) -> None:
    visual = torch.randn(2, 32, requires_grad=True)
    ids = torch.tensor([[3, IMAGE_ID, IMAGE_ID]])
    mllm.decoder.splice(rows_of(ids), visual).sum().backward()
    assert torch.equal(visual.grad, torch.ones(2, 32))
    rows = mllm.llama.model.embed_tokens.weight.grad.abs().sum(1).nonzero().flatten()
    assert rows.tolist() == [3]  # not row 0, which stands in for placeholders


def test_padding_changes_no_state(mllm: Llava) -> None:
    ids = torch.randint(1, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    ids[0, 3:5] = IMAGE_ID
    visual = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    alone = states_of(mllm, rows_of(ids), visual)
    longer = torch.cat([torch.cat([ids, torch.zeros(1, 6, dtype=torch.int64)], 1), torch.full((1, 18), 9)])
    beside = states_of(mllm, rows_of(longer), visual)
    torch.testing.assert_close(beside[:1, :12], alone, rtol=0, atol=2e-6)


def test_states_look_back_only(mllm: Llava) -> None:
    ids = torch.randint(1, 50, (1, 10), generator=torch.Generator().manual_seed(0))
    visual = torch.zeros(0, 32)
    before = states_of(mllm, rows_of(ids), visual)
    ids[0, 6] = 1 + ids[0, 6] % 40
    after = states_of(mllm, rows_of(ids), visual)
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=0, atol=1e-6)
    assert (after[:, 6:] - before[:, 6:]).abs().amax(-1).min() > 1e-3


def test_states_are_normalised_and_give_the_models_own_logits(mllm: Llava) -> None:
    ids = torch.randint(1, 50, (2, 10), generator=torch.Generator().manual_seed(0))
    states = states_of(mllm, rows_of(ids))
    torch.testing.assert_close(states.pow(2).mean(-1), torch.ones(2, 10), rtol=1e-2, atol=0)
    torch.testing.assert_close(mllm.decoder.logits(states), mllm.llama(input_ids=ids).logits, rtol=0, atol=1e-6)


def test_casting_to_bfloat16_keeps_positions_far_into_a_conversation(mllm: Llava) -> None:
    """Rounded rotary frequencies are off by a radian at position 700, and the last of many equal tokens drifts."""
    position = torch.arange(0, 2048)[None]
    cos, sin = mllm.llama.model.rotary_emb(torch.zeros(1), position)
    frequencies = 1 / 10000 ** (torch.arange(0, 16, 2).double() / 16)
    angles = (position[0, :, None] * frequencies).repeat(1, 2)
    low = copy.deepcopy(mllm).to(torch.bfloat16)
    for rotary_cos, rotary_sin in ((cos, sin), low.llama.model.rotary_emb(torch.zeros(1), position)):
        torch.testing.assert_close(rotary_cos[0].double(), angles.cos(), rtol=0, atol=5e-4)
        torch.testing.assert_close(rotary_sin[0].double(), angles.sin(), rtol=0, atol=5e-4)


def test_rotary_frequencies_survive_the_meta_device(mllm: Llava) -> None:
    with torch.device("meta"):
        llama = build_llama(ARCHITECTURE, vocab_size=50)
    llama.to_empty(device="cpu").load_state_dict(mllm.llama.state_dict())
    ids = torch.arange(1, 30)[None]
    assert torch.equal(llama(input_ids=ids).logits, mllm.llama(input_ids=ids).logits)


def test_autograd_keeps_nothing_of_a_frozen_tower(mllm: Llava) -> None:
    mllm.clip.requires_grad_(False)
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert not mllm.clip(pixels).requires_grad
    assert mllm.see(pixels).requires_grad


def test_lora_goes_into_its_targets_and_starts_without_effect(mllm: Llava) -> None:
    ids = torch.arange(1, 30)[None]
    before = mllm.llama(input_ids=ids).logits
    linear = {name for name, module in mllm.llama.named_modules() if isinstance(module, torch.nn.Linear)}
    add_lora(mllm.llama, rank=2, alpha=4, dropout=0.0, targets=["q_proj", "v_proj"])
    adapted = {name.partition(".lora_")[0] for name, _ in mllm.llama.named_parameters() if ".lora_" in name}
    assert adapted == {name for name in linear if name.endswith(("q_proj", "v_proj"))}
    assert len(adapted) == 4
    assert torch.equal(mllm.llama(input_ids=ids).logits, before)


def test_lora_adds_its_scaled_product(mllm: Llava) -> None:
    torch.manual_seed(1)
    add_lora(mllm.llama, rank=2, alpha=6, dropout=0.0, targets=["q_proj"])
    layer = mllm.llama.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 32)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + 6 / 2 * product).T, rtol=0, atol=1e-5)


def test_head_and_embeddings_are_not_tied(glus: Glus) -> None:
    llama = glus.mllm.llama
    assert llama.lm_head.weight.data_ptr() != llama.model.embed_tokens.weight.data_ptr()


@pytest.fixture
def begin_and_ends() -> tuple[torch.Tensor, torch.Tensor]:
    """A beginning that two sequences share, and their own tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 50, (1, 4), generator=generator), torch.randint(1, 50, (2, 5), generator=generator)


def _whole(mllm: Llava, *parts: torch.Tensor) -> torch.Tensor:
    """States of sequences that are read at once."""
    return states_of(mllm, rows_of(torch.cat(parts, dim=1)))


@pytest.mark.parametrize("grouped", [False, True], ids=["all heads have keys", "two heads share keys"])
def test_reading_on_gives_the_states_of_reading_at_once(
    begin_and_ends: tuple[torch.Tensor, torch.Tensor], grouped: bool
) -> None:
    torch.manual_seed(0)
    architecture = {**ARCHITECTURE, "num_key_value_heads": 1} if grouped else ARCHITECTURE
    mllm = with_llama(architecture)
    begin, ends = begin_and_ends
    with torch.inference_mode():
        first = prefill(mllm, begin[:, :3])
        second = prefill(mllm, begin[:, 3:], 3, [first])
        states = states_of(mllm, rows_of(ends, 4), past=[first, second])
    assert (first.length, second.length) == (3, 1)
    torch.testing.assert_close(states, _whole(mllm, begin.expand(2, -1), ends)[:, 4:], rtol=0, atol=2e-6)


def test_sequences_continue_the_row_they_are_told(
    mllm: Llava, begin_and_ends: tuple[torch.Tensor, torch.Tensor]
) -> None:
    _, ids = begin_and_ends
    with torch.inference_mode():
        swapped = prefill(mllm, ids[:, :4]).of_rows(torch.tensor([1, 0]))
        states = states_of(mllm, rows_of(ids.flip(0)[:, 4:], 4), past=[swapped])
    torch.testing.assert_close(states[:, 0], _whole(mllm, ids).flip(0)[:, 4], rtol=0, atol=2e-6)


def test_tokens_see_what_they_are_told(mllm: Llava, begin_and_ends: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Two endings of one trunk, the second blind to the first: the states of two sequences."""
    begin, ends = begin_and_ends
    tokens = torch.cat([ends[0], ends[1]])[None]
    sees = torch.block_diag(*[torch.ones(5, 5).tril()] * 2).bool()[None]
    positions = torch.arange(4, 9).repeat(2)[None]
    with torch.inference_mode():
        prefix = prefill(mllm, begin)
        states = states_of(mllm, rows_of(tokens, position_ids_BL=positions, sees_BLL=sees), past=[prefix])
    expected = _whole(mllm, begin.expand(2, -1), ends)[:, 4:].flatten(0, 1)
    torch.testing.assert_close(states[0], expected, rtol=0, atol=2e-6)


def test_only_what_is_continued_is_kept(
    mllm: Llava, begin_and_ends: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of a layer are gone when the next one runs."""
    begin, ends = begin_and_ends
    alive: list[weakref.ref] = []
    counts: list[int] = []
    update = PrefixCache.update

    def watched(cache: PrefixCache, keys: torch.Tensor, *others: Any, **options: Any) -> Any:
        counts.append(sum(one() is not None for one in alive))
        alive.append(weakref.ref(keys))
        return update(cache, keys, *others, **options)

    with torch.inference_mode():
        prefix = prefill(mllm, begin)
        monkeypatch.setattr(PrefixCache, "update", watched)
        mllm.states(rows_of(ends, 4), NOTHING, [prefix])
    assert counts == [0, 0]
