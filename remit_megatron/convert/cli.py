"""The commands `remit convert import | export | verify | check | adopt | to-megatron-lm`."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from remit_megatron.errors import RunError, UserError

DTYPES = ("fp32", "bf16")


def add_parser(commands: Any) -> None:
    """Add `convert` to the subcommands of `remit`."""
    parser = commands.add_parser("convert", help="checkpoints of Hugging Face and Megatron-LM in and out")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    one = actions.add_parser("import", help="a Hugging Face folder to a checkpoint that any layout loads")
    one.add_argument("source", metavar="HF_FOLDER", help="folder, or a hub id org/name[@revision]")
    one.add_argument("checkpoint", metavar="CHECKPOINT", help="new folder")
    one.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as stored")
    _add_allow_key(one)
    one.set_defaults(func=_import)

    two = actions.add_parser("export", help="a checkpoint to a Hugging Face folder")
    two.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint or run folder")
    two.add_argument("target", metavar="HF_FOLDER", help="new folder")
    two.add_argument("--like", required=True, metavar="HF_FOLDER", help="where config and tokenizer are taken from")
    two.add_argument("--dtype", choices=DTYPES, help="type of the tensors; default: as stored")
    two.add_argument("--max-shard-gb", type=float, default=5.0, help="largest safetensors file, in 1e9 bytes")
    _add_allow_key(two)
    two.set_defaults(func=_export)

    three = actions.add_parser("verify", help="float32 logits of a folder and a checkpoint; exit 1 if they differ")
    three.add_argument("source", metavar="HF_FOLDER")
    three.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint or run folder")
    three.add_argument("--text", help="text to compare on; default: a short one")
    three.add_argument("--tolerance", type=float, default=1e-3, help="largest difference of a logit; default 1e-3")
    three.set_defaults(func=_verify)

    four = actions.add_parser("check", help="would these two do as student and reference?")
    four.add_argument("base", metavar="BASE", help="folder or hub id")
    four.add_argument("reference", metavar="REFERENCE", help="folder or hub id")
    four.add_argument("--allow-added-tokens", action="store_true", help="accept tokens that one tokenizer has added")
    _add_allow_key(four)
    four.set_defaults(func=_check)

    five = actions.add_parser("adopt", help="give a checkpoint of Megatron-LM a manifest, where it lies")
    five.add_argument("checkpoint", metavar="CHECKPOINT", help="an iter_* folder, or the folder it was saved into")
    five.add_argument("--vocab-size", type=int, metavar="ROWS", help="rows without padding; default: all")
    five.set_defaults(func=_adopt)

    six = actions.add_parser("to-megatron-lm", help="a checkpoint to a folder that Megatron-LM's --load goes on from")
    six.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint or run folder")
    six.add_argument("target", metavar="FOLDER", help="new folder")
    six.set_defaults(func=_to_megatron_lm)


def _add_allow_key(parser: Any) -> None:
    parser.add_argument(
        "--allow-key",
        action="append",
        default=[],
        metavar="NAME",
        help="a key of config.json that the program does not know, and that you know to change nothing",
    )


def _dtype(name: str | None) -> Any:
    import torch

    return {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _import(arguments: argparse.Namespace) -> int:
    from remit_megatron.convert.hub import local_folder
    from remit_megatron.convert.place import check_target
    from remit_megatron.hf.config import read_json
    from remit_megatron.hf.mapping import read_shape

    # What can be refused is refused before torch and Megatron are imported, which takes seconds.
    check_target(Path(arguments.checkpoint))
    source = local_folder(arguments.source, "HF_FOLDER")
    read_shape(read_json(source / "config.json"), source / "config.json", arguments.allow_key)
    from remit_megatron.convert.importer import import_folder

    kind = import_folder(source, Path(arguments.checkpoint), _dtype(arguments.dtype), allowed_keys=arguments.allow_key)
    print(f"{arguments.checkpoint}: converted from {arguments.source}, weights in {kind}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from remit_megatron.convert.hub import local_folder
    from remit_megatron.convert.place import check_target

    if not 0 < arguments.max_shard_gb < math.inf:
        raise UserError(f"--max-shard-gb {arguments.max_shard_gb:g}: a number above 0 is expected")
    check_target(Path(arguments.target))
    like = local_folder(arguments.like, "--like")
    from remit_megatron.convert.exporter import export_checkpoint, left_behind

    written = export_checkpoint(
        arguments.checkpoint,
        Path(arguments.target),
        like,
        _dtype(arguments.dtype),
        int(arguments.max_shard_gb * 1e9),
        allowed_keys=arguments.allow_key,
    )
    if rest := left_behind(like):
        print(f"remit: not taken from {like}: {', '.join(rest)}", file=sys.stderr)
    print(f"{arguments.target}: {'written' if written else 'was there already, made'} from {arguments.checkpoint}")
    return 0


def _adopt(arguments: argparse.Namespace) -> int:
    from remit_megatron.mcore import platform

    platform.activate("cpu")
    from remit_megatron.convert.megatron_lm import adopt, describe_adopted

    if arguments.vocab_size is not None and arguments.vocab_size < 1:
        raise UserError(f"--vocab-size {arguments.vocab_size}: a number above 0 is expected")
    print(f"{arguments.checkpoint}: {describe_adopted(adopt(Path(arguments.checkpoint), arguments.vocab_size))}")
    return 0


def _to_megatron_lm(arguments: argparse.Namespace) -> int:
    from remit_megatron.convert.place import check_target
    from remit_megatron.mcore import platform

    check_target(Path(arguments.target))
    platform.activate("cpu")
    from remit_megatron.convert.megatron_lm import export

    print(f"{arguments.target}: {export(arguments.checkpoint, Path(arguments.target))}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from remit_megatron.convert.hub import local_folder
    from remit_megatron.convert.verify import TEXT, compare_logits

    folder = local_folder(arguments.source, "HF_FOLDER")
    agreement = compare_logits(folder, arguments.checkpoint, arguments.text or TEXT)
    print(agreement)
    if not agreement.largest <= arguments.tolerance:  # also for NaN
        raise RunError(f"{arguments.checkpoint}: logits differ by more than {arguments.tolerance:g} from {folder}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from remit_megatron.convert.hub import local_folder
    from remit_megatron.convert.pair import check_pair

    base, reference = local_folder(arguments.base, "BASE"), local_folder(arguments.reference, "REFERENCE")
    pair = check_pair(base, reference, arguments.allow_added_tokens, arguments.allow_key)
    for line in pair.notes:
        print(f"note   {line}")
    for line in pair.wrong:
        print(f"wrong  {line}")
    if pair.wrong:
        raise UserError(f"{arguments.reference} does not do as a reference for {arguments.base}: see above")
    print(f"{arguments.reference} does as a reference for {arguments.base}")
    return 0
