"""The identity of a tokenizer: equal if and only if ids are equal, whatever else a file holds."""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from remit_megatron.data.tokenizer import (
    canonical,
    differ_in_added_tokens_only,
    identity,
    largest_id,
    load_tokenizer,
    parse_tokenizer,
    same_tokenizer,
    tokenizer_hash,
)
from remit_megatron.errors import UserError
from tests.data_prep.tokenizers import EOD, TEXTS, build

Content = dict[str, Any]
WORD = "\u0120river!"
"""A vocabulary entry that no merge leads to, and that the split below gives as one piece."""
BYTE_LEVEL, SENTENCEPIECE = "byte level", "sentencepiece"


def byte_level() -> Content:
    """NFC, a split at spaces, bytes; an entry without merges, as Llama 3 has 588 of them; a special token."""
    content = json.loads(build("nfc", vocab_size=420).to_str())
    content["model"]["vocab"][WORD] = len(content["model"]["vocab"])
    split = {"type": "Split", "pattern": {"Regex": r" ?[^\s]+|\s+"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"]["pretokenizers"][0] = split
    content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = False
    return content


FILES: dict[str, Content] = {
    BYTE_LEVEL: byte_level(),
    SENTENCEPIECE: json.loads(build(SENTENCEPIECE, vocab_size=420).to_str()),
}
MARK = {BYTE_LEVEL: EOD, SENTENCEPIECE: "</s>"}
CORPUS = [
    *TEXTS,
    "near the river! and a river!",
    "cafe\u0301 \u212b \ufb01",
    "a\ue000\ue001b",
    "the the then",
    "  leading",
    *(text.format(t) for t in MARK.values() for text in ("a{0}b", "x {0}  y", "one {0}\n\n z", " {0}", "{0}e\u0301")),
    "say <added> here",
    "e\u0301>\u0338",
]


def model(content: Content) -> Content:
    return content["model"]


def byte_step(content: Content) -> Content:
    steps = (content["pre_tokenizer"] or {}).get("pretokenizers", [])
    return next((step for step in steps if step["type"] == "ByteLevel"), {})


def edit(change: Callable[[Content], Any]) -> Callable[[Content], Content]:
    def changed(content: Content) -> Content:
        copied = copy.deepcopy(content)
        change(copied)
        return copied

    return changed


def mark(content: Content) -> Content:
    return next(token for token in content["added_tokens"] if token["content"] in MARK.values())


def merges_as_strings(content: Content) -> None:
    model(content)["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model(content)["merges"]]


def nest(content: Content) -> None:
    for part, inner in (("pre_tokenizer", "pretokenizers"), ("normalizer", "normalizers")):
        kept = [content[part]] if content[part] else []
        content[part] = {"type": "Sequence", inner: [{"type": "Sequence", inner: kept}]}


def drop_defaults(content: Content) -> None:
    for key in ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"):
        if not model(content).get(key):
            model(content).pop(key, None)


HARMLESS: dict[str, Callable[[Content], Content]] = {
    "offsets": edit(lambda c: byte_step(c).update(trim_offsets=True) if byte_step(c) else None),
    "decoder": edit(lambda c: c.update(decoder=None)),
    "post-processor": edit(
        lambda c: c.update(post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False})
    ),
    "truncation": edit(
        lambda c: c.update(truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0})
    ),
    "padding": edit(
        lambda c: c.update(
            padding={"strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 1}
            | {"pad_type_id": 0, "pad_token": "p"}
        )
    ),
    "merges as strings": edit(merges_as_strings),
    "nested sequences": edit(nest),
    "defaults left out": edit(drop_defaults),
    "special": edit(lambda c: mark(c).update(special=not mark(c)["special"])),
    "another id in the file": edit(lambda c: mark(c).update(id=77)),
    "no type": edit(lambda c: model(c).pop("type", None)),
    "empty affixes": edit(lambda c: model(c).update(continuing_subword_prefix="", end_of_word_suffix="")),
    "no dropout": edit(lambda c: model(c).update(dropout=0.0)),
    "a token never unknown": edit(lambda c: model(c).update(unk_token=None, fuse_unk=True)),
}
HARMFUL: dict[str, Callable[[Content], Content]] = {
    "none": lambda content: content,
    # In the other kind no text becomes a piece that is an entry without merges, which `canonical` counts all the same.
    "ignore_merges": edit(lambda c: model(c).update(ignore_merges=True) if byte_step(c) else None),
    "byte_fallback": edit(lambda c: model(c).update(byte_fallback=not model(c).get("byte_fallback"))),
    "lstrip": edit(lambda c: mark(c).update(lstrip=True)),
    "rstrip": edit(lambda c: mark(c).update(rstrip=True)),
    "single_word": edit(lambda c: mark(c).update(single_word=True)),
    "an added token": edit(lambda c: c["added_tokens"].append({**mark(c), "id": 999, "content": "<added>"})),
    "no normalizer": edit(lambda c: c.update(normalizer=None)),
    "merges in another order": edit(lambda c: c["model"]["merges"].reverse()),
    "an entry moved": edit(lambda c: swap(c["model"]["vocab"])),
    "prefix space": edit(lambda c: byte_step(c).update(add_prefix_space=True) if byte_step(c) else None),
    "another split": edit(lambda c: byte_step(c).update(use_regex=True) if byte_step(c) else None),
}


def swap(vocabulary: dict[str, int]) -> None:
    a, b = "e", "t"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def ids(content: Content) -> list[list[int]]:
    tokenizer = parse_tokenizer(json.dumps(content))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in CORPUS]


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(list(FILES)),
    sides=st.lists(
        st.tuples(st.sets(st.sampled_from(list(HARMLESS))), st.sampled_from(list(HARMFUL))), min_size=2, max_size=2
    ),
)
def test_equal_identity_if_and_only_if_equal_ids(kind: str, sides: list[tuple[set[str], str]]) -> None:
    made = []
    for harmless, harmful in sides:
        content = HARMFUL[harmful](FILES[kind])
        for name in sorted(harmless):
            content = HARMLESS[name](content)
        made.append(content)
    one, other = made
    assert same_tokenizer(identity(one), identity(other)) == (ids(one) == ids(other)), sides


@pytest.mark.parametrize("name", list(HARMFUL)[1:])
def test_what_changes_ids_changes_the_identity(name: str) -> None:
    """Each for itself, on the kind of tokenizer that it matters to, so that the property above is not an empty one."""
    changed = {kind: HARMFUL[name](content) for kind, content in FILES.items()}
    differing = [kind for kind in FILES if ids(FILES[kind]) != ids(changed[kind])]
    assert differing
    for kind in FILES:
        same = same_tokenizer(identity(FILES[kind]), identity(changed[kind]))
        assert same == (kind not in differing)


def test_ignore_merges_that_changes_nothing() -> None:
    content = copy.deepcopy(FILES[BYTE_LEVEL])
    del content["model"]["vocab"][WORD]
    kept = HARMFUL["ignore_merges"](content)
    assert ids(content) == ids(kept)
    assert same_tokenizer(identity(content), identity(kept))


def test_unknown_characters_of_a_whole_alphabet() -> None:
    """Every byte has an entry: what stands for the unknown is never used. Without one of them it is."""
    content = FILES[BYTE_LEVEL]
    other = edit(lambda c: model(c).update(unk_token=EOD, byte_fallback=True, fuse_unk=True))(content)
    assert ids(content) == ids(other)
    assert same_tokenizer(identity(content), identity(other))
    # The byte 0xEE, of U+E000, has left the alphabet.
    holed = [edit(lambda c: model(c)["vocab"].pop("\u00ee"))(each) for each in (content, other)]
    for each in holed:
        model(each)["merges"] = [m for m in model(each)["merges"] if "\u00ee" not in "".join(m)]
        model(each)["vocab"] = {k: v for k, v in model(each)["vocab"].items() if "\u00ee" not in k}
    assert ids(holed[0]) != ids(holed[1])
    assert not same_tokenizer(identity(holed[0]), identity(holed[1]))


def test_a_split_that_never_happens() -> None:
    """As transformers writes Gemma's: the normalizer has replaced every blank before the split at blanks."""
    content = edit(lambda c: c["normalizer"]["normalizers"].pop(0))(FILES[SENTENCEPIECE])
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    idle = edit(lambda c: c.update(pre_tokenizer=split))(content)
    assert ids(content) == ids(idle)
    assert same_tokenizer(identity(content), identity(idle))
    at_e = edit(lambda c: c["pre_tokenizer"]["pattern"].update(String="e"))(idle)
    assert ids(content) != ids(at_e)
    assert not same_tokenizer(identity(content), identity(at_e))


def test_ids_of_added_tokens_are_the_library_s() -> None:
    for content in (FILES[BYTE_LEVEL], HARMFUL["an added token"](FILES[BYTE_LEVEL]), FILES[SENTENCEPIECE]):
        shuffled = edit(lambda c: c["added_tokens"].reverse())(content)
        decoder = Tokenizer.from_str(json.dumps(shuffled)).get_added_tokens_decoder()
        parts = canonical(shuffled)
        assert {text: number for text, (number, _) in parts["added tokens"].items()} == {
            str(token.content): number for number, token in decoder.items()
        }
        assert largest_id(parts) == max([*decoder, *content["model"]["vocab"].values()])


def test_identities_of_before_are_recognised() -> None:
    """The SHA-256 of manifests, over all but padding and truncation, and the twelve digits of converted models."""
    content = FILES[BYTE_LEVEL]
    stored = {k: v for k, v in content.items() if k not in ("padding", "truncation")}
    old = hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()
    parts = {
        "model type": "BPE",
        "vocabulary": content["model"]["vocab"],
        "merges": [" ".join(m) for m in content["model"]["merges"]],
        "normalizer": content["normalizer"],
        "pre-tokenizer": content["pre_tokenizer"],
    }
    short = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    other = HARMFUL["an entry moved"](content)
    for known in (old, short):
        assert same_tokenizer(known, identity(content))
        assert same_tokenizer(identity(HARMLESS["truncation"](content)), known)
        assert not same_tokenizer(identity(other), known)
    assert same_tokenizer(old, old)
    assert not same_tokenizer(old, hashlib.sha256(b"x").hexdigest())


def test_added_tokens_alone() -> None:
    content = FILES[BYTE_LEVEL]
    more = identity(HARMFUL["an added token"](content))
    assert differ_in_added_tokens_only(identity(content), more)
    assert not differ_in_added_tokens_only(identity(content), identity(content))
    assert not differ_in_added_tokens_only(identity(HARMFUL["no normalizer"](content)), more)


def test_loading_forgets_truncation_and_padding(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(HARMLESS["padding"](HARMLESS["truncation"](FILES[BYTE_LEVEL]))))
    assert len(Tokenizer.from_file(str(path)).encode("the quick brown fox", add_special_tokens=False).ids) == 40
    want = parse_tokenizer(json.dumps(FILES[BYTE_LEVEL])).encode("the quick brown fox", add_special_tokens=False).ids
    for named in (path, tmp_path):
        assert load_tokenizer(named).encode("the quick brown fox", add_special_tokens=False).ids == want


BROKEN: dict[str, Any] = {
    "no valid JSON": "{",
    "nested deeper": "[" * 5000 + "]" * 5000,
    "is no JSON object": "[1]",
    "has no key 'model'": {"model": 3},
    "no tokenizer of the `tokenizers` library: 'vocab'": {"model": {"type": "BPE"}},
    "no tokenizer of the `tokenizers` library: 'str' object": {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        "added_tokens": ["x"],
    },
}


@pytest.mark.parametrize("message", list(BROKEN))
def test_broken_files_are_refused_in_a_line(message: str, tmp_path: Path) -> None:
    content = BROKEN[message]
    (tmp_path / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as error:
        tokenizer_hash(tmp_path)
    assert message in str(error.value)
    assert "tokenizer.json" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^key: .*cannot be read"):
        load_tokenizer(tmp_path, "key")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"key: .* does not exist: name a tokenizer\.json, or a folder with one"):
        load_tokenizer(tmp_path / "none", "key")
