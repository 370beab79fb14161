"""Several corpora mixed by weight: exact shares in every stretch, one order on any number of ranks, each
source whole."""

from collections import Counter

import numpy as np
import pytest
import torch
from recipe import metrics, pretrain_flags, recipe
from test_data import make_corpus

from dtensor_llama import UsageError
from dtensor_llama.data.mix import MixedSequences, open_sequences, parse_mixture
from dtensor_llama.data.reader import Batching, SequenceReader, validation_batches
from dtensor_llama.data.sequences import PackedSequences, Packing
from dtensor_llama.data.sources import TextOptions
from dtensor_llama.data.tokenizer import load_tokenizer

WEIGHTS = (0.55, 0.3, 0.15)
T = 8


@pytest.fixture
def mixed(tmp_path) -> MixedSequences:
    """Three sources whose tokens tell which they are: 0 .., 10_000 .., 20_000 .."""
    corpora = [
        make_corpus(tmp_path / str(k), 10_000 * k + np.arange(1000 + 400 * k), [0, 500])
        for k in range(len(WEIGHTS))
    ]
    return MixedSequences(
        {
            f"source-{k}": (PackedSequences(corpora[k], Packing(T, 0.1, seed=5)), weight)
            for k, weight in enumerate(WEIGHTS)
        }
    )


def sources_of(sequences: MixedSequences, indices) -> np.ndarray:
    return sequences.tokens_of(indices)[:, 0] // 10_000


def test_any_stretch_of_sequences_has_the_shares_asked_for(mixed):
    source = sources_of(mixed, mixed.sequences_at(np.arange(4000)))
    for k, weight in enumerate(WEIGHTS):
        dealt = np.cumsum(source == k)
        for first, n in ((0, 20), (1, 20), (777, 100), (1500, 2000)):
            assert abs(dealt[first + n] - dealt[first] - n * weight) < 3
        assert dealt[-1] == mixed.parts(4000)[k][2] == pytest.approx(4000 * weight, abs=2)


def test_each_source_comes_in_its_own_order_whole_before_it_comes_again(mixed):
    indices = mixed.sequences_at(np.arange(2000))
    source = sources_of(mixed, indices)
    for k, own in enumerate(mixed.sources):
        mine = indices[source == k]
        assert (mine == mixed._first[k] + own.sequences_at(np.arange(len(mine)))).all()
        assert len(set(mine[: own.n_train])) == min(own.n_train, len(mine))
    assert not set(indices) & set(mixed.validation_sequences())


def test_held_out_sequences_have_the_shares_too_and_none_comes_twice(mixed):
    held_out = mixed.validation_sequences()
    assert len(held_out) == mixed.n_validation == len(set(held_out)) > 20
    counts = Counter(sources_of(mixed, held_out).tolist())
    assert all(
        counts[k] == pytest.approx(mixed.n_validation * weight, abs=2) for k, weight in enumerate(WEIGHTS)
    )
    assert sum(len(batch.tokens) for batch in validation_batches(mixed, Batching(4, 4))) >= mixed.n_validation


def test_sequences_and_position_do_not_depend_on_ranks_or_stops(mixed):
    def read(ranks: int, first: int, steps: int) -> torch.Tensor:
        readers = [
            SequenceReader(mixed, Batching(12, 12 // ranks, rank, ranks, document_mask=True), position=first)
            for rank in range(ranks)
        ]
        taken = [
            torch.cat([torch.cat([micro.tokens for micro in next(reader)]) for reader in readers])
            for _ in range(steps)
        ]
        assert {reader.position for reader in readers} == {first + 12 * steps}
        for reader in readers:
            reader.close()
        return torch.cat(taken)

    whole = read(1, 0, 6)
    assert torch.equal(whole, read(3, 0, 6))
    assert torch.equal(whole[36:], read(2, 36, 3))


def test_a_document_boundary_is_that_of_the_source(mixed):
    number = mixed._first[2] + 500 // T
    assert mixed.document_starts_of(int(number)).tolist() == [500 % T]


def test_paths_with_weights_are_a_mixture_and_others_are_what_they_were(inputs, tmp_path, capfd):
    one, two = tmp_path / "a.txt", tmp_path / "b:0.5.txt"
    one.write_text("alpha beta " * 400)
    two.write_text("gamma delta " * 400)
    arguments = tmp_path / "cache", TextOptions(), Packing(16, 0.1)
    tokenizer = load_tokenizer(inputs / "tokenizer")
    sequences = open_sequences([f"{one}:7", f"{tmp_path}/b*:3"], tokenizer, *arguments)
    assert sequences.shares == [0.7, 0.3] and sequences.contents.startswith("0.7 x (")
    assert capfd.readouterr().err.count(" MB: 1 document, ") == 2
    both = open_sequences([str(one), str(two)], tokenizer, *arguments)
    assert isinstance(both, PackedSequences) and both.n_sequences > sequences.sources[0].n_sequences
    tmp_path.joinpath("a.txt:0.5").write_text("a file may be called so")
    assert parse_mixture([f"{one}:0.5"]) is None


@pytest.mark.parametrize(
    "paths,said",
    [
        (["a.txt:0", "b.txt:1"], "the weight 0 is not possible"),
        (["a.txt:-1", "b.txt:1"], "the weight -1"),
        (["a.txt:nan", "b.txt:1"], "the weight nan"),
        (["a.txt:inf", "b.txt:1"], "the weight inf"),
        (["a.txt:1e308", "b.txt:1e308"], "the weight 1e308"),
        (["a.txt:0.5", "b.txt"], "b.txt has no weight and a.txt has one"),
        (["a.txt:0.5", "a.txt:0.5"], "a.txt is there twice"),
        ([f"{__file__}:0,5"], "'0,5' is no weight"),
    ],
)
def test_weights_that_cannot_be_are_refused_in_words(paths, said):
    with pytest.raises(UsageError, match="data.path=") as refused:
        parse_mixture(paths)
    assert said in str(refused.value)


def test_no_source_trains_on_a_file_of_which_another_holds_out_a_part(inputs, tmp_path):
    (tmp_path / "a.txt").write_text("alpha beta " * 400)
    (tmp_path / "b.txt").write_text("gamma delta " * 400)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    tokenizer, packing = load_tokenizer(inputs / "tokenizer"), Packing(16, 0.1)
    for again in ("*.txt", "link.txt", "../" + tmp_path.name + "/a.txt"):
        paths = [f"{tmp_path}/a.txt:1", f"{tmp_path}/{again}:1"]
        with pytest.raises(UsageError, match=r"/a\.txt is in data\.path=.*/a\.txt too"):
            open_sequences(paths, tokenizer, tmp_path / "cache", TextOptions(), packing)


def test_a_source_that_cannot_be_read_is_named(inputs, tmp_path):
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(UsageError, match="a.txt: seq_len=16"):
        open_sequences(
            [f"{tmp_path}/a.txt:1"],
            load_tokenizer(inputs / "tokenizer"),
            tmp_path / "cache",
            TextOptions(),
            Packing(16, 0.1),
        )
    source = PackedSequences(make_corpus(tmp_path / "c", range(1000)), Packing(T, 0.1))
    with pytest.raises(UsageError, match="too small"):
        MixedSequences({"much": (source, 1.0), "hardly": (source, 1e-12)})


def test_a_mixed_run_says_each_source_s_loss_and_does_not_depend_on_ranks(inputs, tmp_path):
    text = (inputs / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(text[::2]))
    (tmp_path / "b.jsonl").write_text("".join(text[1::2]))
    sources = [f"{tmp_path}/a.jsonl:0.75", f"{tmp_path}/b.jsonl:0.25"]
    for ranks in (1, 2):
        flags = pretrain_flags(inputs, tmp_path / str(ranks), "--checkpoint.every", 0, steps=4)
        at = flags.index("--data.path") + 1
        ended = recipe("pretrain", *flags[:at], *sources, *flags[at + 1 :], ranks=ranks)
        assert ended.status == 0 and "a.jsonl: " in ended.out, ended
    for one, two in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert abs(one["loss"] - two["loss"]) < 2e-5
    last = metrics(tmp_path / "2")[-1]
    own = [last[f"validation_loss/{tmp_path}/{name}.jsonl"] for name in "ab"]
    # of other held-out sequences
    assert own[0] != own[1] and last["validation_loss"] == pytest.approx(sum(own) / 2, abs=0.5)
