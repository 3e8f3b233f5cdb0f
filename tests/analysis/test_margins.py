"""Figures, coloured text and pictures from a comparison whose numbers are known."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from remit_megatron.analysis.comparison import Comparison, ModelTokens
from remit_megatron.analysis.heatmap import colour, page
from remit_megatron.analysis.margins import concentration, summarise, token_table
from remit_megatron.analysis.plots import plot_comparison
from remit_megatron.analysis.tokens import words
from tests.data_prep import tokenizers


@pytest.fixture
def comparison() -> Comparison:
    """Two samples of ten; token 3 six times with a margin of 2, token 9 with -0.5, the others 0; one masked."""
    tokens = np.array([[3, 3, 3, 1, 1, 2, 9, 9, 9, 5], [3, 3, 3, 1, 1, 2, 9, 9, 9, 3]], dtype=np.int32)
    mask = np.ones(tokens.shape, dtype=bool)
    mask[1, 9] = False
    reference = np.where(mask, 1.0, 0.0).astype(np.float32)
    margin = np.select([tokens == 3, tokens == 9], [2.0, -0.5], 0.0)
    model = ModelTokens(
        nll=np.where(mask, reference + margin, 0.0).astype(np.float32),
        kl=np.where(mask, 0.25, 0.0).astype(np.float32),
        weight=np.where(mask, 1.0 + 0.2 * np.sign(margin), 0.0).astype(np.float32),
    )
    sources = {"reference": "runs/rl", "base": "runs/<base>"}
    return Comparison(
        set_name="held", tokens=tokens, mask=mask, reference_nll=reference, models={"base": model}, sources=sources
    )


def test_summary(comparison: Comparison) -> None:
    summary = summarise(comparison, lambda token: f"t{token}")
    assert (summary["samples"], summary["tokens"]) == (2, 19)
    assert summary["reference_nll"] == 1.0
    base = summary["models"]["base"]
    assert base["margin"]["mean"] == pytest.approx((6 * 2.0 - 6 * 0.5) / 19)
    assert base["nll"] == pytest.approx(1 + base["margin"]["mean"])
    assert base["margin"]["quantiles"]["0.5"] == 0.0
    assert base["share_reference_surer"] == base["share_model_surer"] == pytest.approx(6 / 19)
    assert base["kl"]["mean"] == 0.25
    assert base["concentration"]["0.1"] == pytest.approx(2 / 6), "two of nineteen tokens hold two of six margins"
    assert base["tokens_the_reference_is_surer_of"] == [
        {"token": 3, "count": 6, "mean_margin": 2.0, "text": "t3"},
        {"token": 9, "count": 6, "mean_margin": -0.5, "text": "t9"},
    ], "the masked one does not count, nor ids that occur less than five times"


def test_concentration() -> None:
    assert concentration(np.ones(100)) == pytest.approx({"0.01": 0.01, "0.05": 0.05, "0.1": 0.1})
    assert concentration(np.array([5.0] + [-1.0] * 99)) == {"0.01": 1.0, "0.05": 1.0, "0.1": 1.0}
    assert concentration(-np.ones(100)) is None


def test_table(comparison: Comparison) -> None:
    table = token_table(comparison)
    names = ["sample", "position", "token", "mask", "nll/reference", "nll/base", "kl/base", "weight/base"]
    assert table.column_names == names
    row = table.slice(16, 1).to_pylist()[0]
    assert row == {
        **{"sample": 1, "position": 6, "token": 9, "mask": True, "nll/reference": 1.0, "nll/base": 0.5},
        **{"kl/base": 0.25, "weight/base": pytest.approx(0.8)},
    }


def test_page(comparison: Comparison) -> None:
    """Every token once, on its colour, markup in the text taken as text."""
    words = [f"<{i}>\n" if i == 3 else f"w{i} " for i in range(10)]
    text = page(comparison, [words])
    assert "runs/&lt;base&gt;" in text
    found = re.findall(r'<span style="background:(#\w+)" title="margin ([^,]+),[^"]*">([^<]*)</span>', text)
    assert [(shade, word) for shade, _, word in found] == [
        (colour(2.0 if i < 3 else -0.5 if 6 <= i < 9 else 0.0), f"&lt;{i}&gt;\u21b5\n" if i == 3 else f"w{i} ")
        for i in range(10)
    ]
    assert found[0][1] == "+2.000"
    both = page(comparison, [words, words])
    assert '<span class="masked">w9 </span>' in both


def test_colours() -> None:
    assert colour(0.09) == colour(-0.09) == colour(float("nan")) == "#ffffff"
    assert colour(3.0) == colour(50.0) == "#ff5050"
    assert colour(-3.0) == "#5050ff"
    depth = [int(colour(x)[3:5], 16) for x in (0.2, 1.0, 2.0, 3.0)]
    assert depth == sorted(depth, reverse=True)


def test_picture(comparison: Comparison) -> None:
    assert plot_comparison(comparison).startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["olmo2", "sentencepiece"])
def test_words(kind: str) -> None:
    """Together they are the text; what is no text costs only itself."""
    tokenizer = tokenizers.build(kind)
    text = "So, x = 3 \u20ac \U0001f600.\n  Th\u00e9n \\boxed{4}"
    ids = tokenizer.encode(text).ids
    found = words(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found).strip() == tokenizer.decode(ids, skip_special_tokens=False).strip()


def test_words_of_broken_bytes() -> None:
    vocabulary = {"<unk>": 0, "<0x0A>": 1, "<0xE9>": 2, "<0x41>": 3, "b": 4, "</s>": 5}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    found = words(tokenizer, [1, 2, 1, 3, 4, 4, 5, 4, 4])
    assert len(found) == 9
    assert "\ufffd" in "".join(found)
    assert "".join(found).endswith("b</s>bb"), found
