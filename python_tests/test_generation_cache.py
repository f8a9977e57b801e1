"""The row cache against transformers' own, the grouping of prompts against all groupings, and the finished flags."""

from itertools import combinations

import pytest
import torch
from trainer_world import tiny_model
from transformers import DynamicCache, Lfm2Config, Llama4TextConfig, LlamaConfig, MistralConfig

from distillm_ext.generation.loop.batching import equal_length_groups, longest_first, prefill_groups
from distillm_ext.generation.loop.cache import RowCache, column_mask, supports_rows
from distillm_ext.generation.loop.progress import FinishedFlags


def states(rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, count, 4, generator=generator) for _ in range(2)]


def test_updates_equal_those_of_a_dynamic_cache():
    config = tiny_model(0, layers=2).config
    ours, theirs = RowCache(config, slots=3, columns=9), DynamicCache(config=config)
    ours.window.last = 3
    for seed, count in enumerate((4, 1, 1)):
        for layer in range(2):
            key, value = states(3, count, 10 * seed + layer)
            found, expected = ours.update(key, value, layer), theirs.update(key, value, layer)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        ours.window.stop += count
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)


def test_rows_move_join_and_are_cleared():
    cache = RowCache(tiny_model(0).config, slots=3, columns=8)
    cache.window.last = 3
    key, value = states(3, 4, 0)
    cache.update(key, value, 0)
    cache.window.stop = 4
    cache.move_rows(torch.tensor([2]), torch.tensor([0]))
    layer = cache.layers[0]
    assert torch.equal(layer.keys[0, :, :4], key[2]) and torch.equal(layer.values[1, :, :4], value[1])
    cache.clear(slice(1, 2), slice(0, 3))
    assert (layer.keys[1, :, :3] == 0).all() and torch.equal(layer.values[1, :, 3], value[1, :, 3])
    cache.move_columns(1, 2, 4)
    assert torch.equal(layer.keys[0, :, :2], key[2, :, 2:]) and torch.equal(layer.keys[2, :, :4], key[2])
    window = cache.window
    window.first, window.last, window.start, window.stop = 1, 2, 2, 2
    new_key, new_value = states(1, 2, 5)
    found, _ = cache.update(new_key, new_value, 0)
    assert torch.equal(found, new_key) and torch.equal(layer.keys[1, :, 2:4], new_key[0])


def test_which_architectures_get_the_row_cache():
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    assert supports_rows(LlamaConfig(**small)) and supports_rows(MistralConfig(sliding_window=4, **small))
    assert not supports_rows(Lfm2Config(layer_types=["conv", "full_attention"], **small))
    assert not supports_rows(Llama4TextConfig(attention_chunk_size=8, **small))


def test_column_mask():
    assert column_mask(torch.tensor([0, 2]), 3).tolist() == [[1, 1, 1], [0, 0, 1]]


def every_grouping(count):
    for cuts in (combo for size in range(count) for combo in combinations(range(1, count), size)):
        edges = [0, *cuts, count]
        yield list(zip(edges, edges[1:], strict=False))


@pytest.mark.parametrize("cost", [0, 3, 16, 1000])
def test_prefill_groups_are_the_cheapest(cost):
    generator = torch.Generator().manual_seed(cost)
    for count in (1, 2, 5, 8):
        lengths = sorted(torch.randint(1, 40, (count,), generator=generator).tolist(), reverse=True)

        def price(groups, lengths=lengths):
            return sum((last - first) * lengths[first] + cost for first, last in groups)

        groups = prefill_groups(lengths, cost=cost)
        assert [first for first, _ in groups] == [0, *(last for _, last in groups[:-1])] and groups[-1][1] == count
        assert price(groups) == min(price(other) for other in every_grouping(count))


def test_prefill_groups_hold_so_many_tokens():
    assert prefill_groups([10] * 5, cost=1000, most_tokens=20) in ([(0, 1), (1, 3), (3, 5)], [(0, 2), (2, 4), (4, 5)],
                                                                  [(0, 2), (2, 3), (3, 5)])  # fmt: skip
    assert prefill_groups([50, 5], cost=1000, most_tokens=20) == [(0, 1), (1, 2)]
    assert longest_first([2, 5, 5, 1]) == [1, 2, 0, 3]


def test_groups_of_equal_length():
    lengths = [7, 7, 7, 4, 4, 1]
    assert equal_length_groups(lengths, 2) == [(0, 2), (2, 3), (3, 5), (5, 6)]
    assert equal_length_groups(lengths, 9) == [(0, 3), (3, 5), (5, 6)]
    assert equal_length_groups([], 3) == []


def test_flags_come_at_once_on_the_cpu_and_a_step_later_elsewhere():
    flags = FinishedFlags(torch.device("cpu"))
    flags.push([4, 7], torch.tensor([True, False]))
    assert flags.read() == {7} and flags.read() == set()
    flags.lag = 1
    flags.push([4, 5], torch.tensor([False, True]))
    assert flags.read() == set()
    flags.push([4, 5], torch.tensor([False, True]))
    assert flags.read() == {4}
