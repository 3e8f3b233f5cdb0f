"""Small tokenizers of the kinds that real models use, trained in the test on text of many scripts."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

EOD = "<|endoftext|>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""The split of OLMo-2 (as cl100k_base) and of SmolLM3 (as Llama-3)."""
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CJK = (
    "[\uac00-\ud7a3\u3131-\u318e]+|"
    "[\uff01\u2026\u201c\u201d\uff1a\uff1b\uff0c\u3001-\u303f]+|[\u4e00-\u9fa5\u3040-\u30ff]+"
)
"""Youtu-LLM splits CJK runs off before a split like o200k_base's."""
KINDS = ("gpt2", "olmo2", "smollm3", "youtu", "nfc", "sentencepiece")
TEXTS = (
    "def train(model, data):\n    for step in range(100):\n\t\tloss = model(data[step]) * 1.5e-3\n\n\n    return 1\r\n",
    "The quick brown fox doesn't jump over 1,234,567 lazy dogs; it'll rest. I'VE SEEN: \"quotes\" (and more)!\n\n",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u0438 \u0432\u0441\u0435\u043c. ",
    "na\u00efve caf\u00e9 e\u0301 \u00fcber stra\u00dfe",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\u6f22\u5b57\uff01 \uc548\ub155 \uc138\uacc4 ",
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 ",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
)


def build(kind: str, vocab_size: int = 700) -> Tokenizer:
    """A tokenizer of one of KINDS; its EOD is EOD, or </s> for sentencepiece."""
    if kind == "sentencepiece":
        return _sentencepiece(vocab_size)
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "smollm3"))
    splits = {"gpt2": [], "youtu": [CJK, CASED]}.get(kind, [LLAMA3])
    parts = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, byte_level]) if parts else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return tokenizer


def _sentencepiece(vocab_size: int) -> Tokenizer:
    """As Llama-2's: spaces are U+2581, one is put first, unknown characters fall back to bytes."""
    space = "\u2581"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(content))


def eod_token(kind: str) -> str:
    return "</s>" if kind == "sentencepiece" else EOD


def save(kind: str, folder: Path) -> Path:
    """A folder as transformers leaves it: tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True)
    build(kind).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": eod_token(kind)}}))
    return folder
