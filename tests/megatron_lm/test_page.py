"""The commands of docs/plugin.md are those that there are; test_pretrain.py and test_checkpoints.py run their like."""

import argparse
from pathlib import Path

from remit_megatron.cli import build_parser
from tests.test_docs import ROOT, commands


def test_commands_of_the_page() -> None:
    from remit_megatron.mcore.megatron_lm.pretrain import add_arguments

    found = commands("docs/plugin.md")
    assert [words[0] for words in found] == ["torchrun", "remit", "remit"]
    for words in found[1:]:
        build_parser().parse_args(words[1:])
    script = found[0].index("examples/megatron_lm/pretrain_remit.py")
    assert (ROOT / found[0][script]).is_file()
    parser = add_arguments(argparse.ArgumentParser())
    known, others = parser.parse_known_args(found[0][script + 1 :])
    assert known.remit_reference == "rl"
    assert not [one for one in others if one.startswith("--remit")]


def test_every_flag_is_on_the_page() -> None:
    from remit_megatron.mcore.megatron_lm.pretrain import add_arguments

    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    text = Path(ROOT / "docs/plugin.md").read_text()
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {flag for flag in flags if f"`{flag} " not in text} == set()
