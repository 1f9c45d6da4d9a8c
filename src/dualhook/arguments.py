"""What the command line takes: commands, options and their help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import dualhook
from dualhook.errors import DualHookError
from dualhook.influence import MEASURES, METHODS, UNITS
from dualhook.query.scores import CRITERIA
from dualhook.store import SEGMENT_BYTES

__all__ = ["parser"]

Command = Callable[[argparse.Namespace], int]

EPILOGS = {
    "demo": "example:\n  dualhook demo --out dualhook-demo",
    "info": "example:\n  dualhook info runs/fmnist",
    "verify": "examples:\n  dualhook verify runs/fmnist --tolerance 1e-6\n  dualhook verify runs/fmnist --deep",
    "compact": """\
Without --dtype and --min-share nothing is lost. Until it is done it takes the disk
space of both; interrupted at any moment, the memory is as it was.

examples:
  dualhook compact runs/fmnist
  dualhook compact runs/fmnist --dtype float16 --min-share 1e-5""",
    "attend": """\
The model's recorded layers get the weights that the memory holds after the last
step, everything else those of --weights, or of the folder that it is loaded from.
Modules in the current directory are found.

examples:
  dualhook attend runs/fmnist --model train:build_model --inputs images.npy
  dualhook attend runs/fmnist --model train:build_model --inputs images.npy \\
      --by abs_weight --top 5 --layers fc1 fc2 --sum-by label --json
  dualhook attend runs/lm --model runs/model --tokenizer runs/model \\
      --text "And God said" --passages runs/tokens""",
    "influence": """\
An estimate of what leaving a training sample out would change, by one of
  decayed       each training gradient met by the prediction's own, as far as later
                training has left it; what it fits first is kept beside the memory
  cosine        cosines between the two, at once; an order, no amounts
  contribution  the exact sum that attend lists, for comparison
Positive: training on the sample has raised the margin, logit or loss asked about.

examples:
  dualhook influence runs/fmnist --model train:build_model --inputs images.npy
  dualhook influence runs/fmnist --model train:build_model --inputs images.npy \\
      --of loss --target 3 --method cosine --top 5 --sum-by label --json""",
    "suspects": """\
Ranked by the run-averaged loss that the rows of the last layer hold: samples with
wrong labels are among the first.

example:
  dualhook suspects runs/fmnist -k 50""",
    "report": """\
Predictions, the training samples that they attend to, totals and receipts on one
page that needs no network. Without --images or --passages training samples are
named by their dataset rows. Of a --text every token is asked about.

examples:
  dualhook report runs/fmnist --model train:build_model --inputs images.npy \\
      --images train_images.npy --labels labels.npy -o report.html
  dualhook report runs/lm --model runs/model --tokenizer runs/model \\
      --text "And God said" --passages runs/tokens -o report.html""",
}


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument like every other error: in one line."""

    def error(self, message: str) -> NoReturn:
        raise DualHookError(f"{message} (see {self.prog} --help)")


def parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser; each command's function goes into ``options.run``."""
    made = _Parser(
        prog="dualhook",
        description="Which training patterns does a prediction attend to? Ask the memory of a recorded training run.",
        epilog="Start with: dualhook demo",
    )
    made.add_argument("--version", action="version", version=f"dualhook {dualhook.__version__}")
    group = made.add_subparsers(title="commands", metavar="COMMAND")
    made.set_defaults(run=_help, parser=made)
    for name, (summary, arguments) in ARGUMENTS.items():
        own = group.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=EPILOGS[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.set_defaults(run=commands[name])
        if name != "demo":
            own.add_argument("path", metavar="PATH", help="the path that was given to dualhook.instrument, or a URL")
            own.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        arguments(own)
    return made


def _help(options: argparse.Namespace) -> int:
    options.parser.print_help(sys.stderr)
    return 2


def _demo_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("dualhook-demo"),
        metavar="DIR",
        help="folder for memory and picture; an earlier demo in it is replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=15,
        metavar="N",
        help="passes over 5,000 images, 80 MB of memory each (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and order (default: %(default)s)")


def _compact_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float64", "float32", "bfloat16", "float16", "int8"),
        metavar="DTYPE",
        help="dtype of the rows: float64, float32, bfloat16, float16 with a scale per row, or int8 with one, rounded "
        "by chance (default: as they are); receipts tell what it loses",
    )
    parser.add_argument(
        "--sparse",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="rows that are mostly zeros without them, or whole again; nothing is lost (default: sparse if any are)",
    )
    parser.add_argument(
        "--min-share",
        type=float,
        default=0.0,
        metavar="X",
        help="drop rows whose norm is below this share of all in their step; receipts say what the rest explains, "
        "tables how many are gone (default: none)",
    )
    parser.add_argument(
        "--segment-bytes",
        type=int,
        default=SEGMENT_BYTES,
        metavar="N",
        help="what a segment may grow to (default: %(default)s)",
    )


def _question_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODULE:CALLABLE",
        help="builds the model when called without arguments; of a causal language model also the folder that its "
        "save_pretrained has written",
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="what the model is asked: .npy (one array, queries first) or .safetensors (tensors by argument name)",
    )
    asked.add_argument(
        "--text", metavar="PROMPT", help="what a language model is asked, about its last token (needs --tokenizer)"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="folder or name that AutoTokenizer.from_pretrained of transformers takes"
    )
    parser.add_argument(
        "--passages",
        type=Path,
        metavar="DIR",
        help="the tokenised training data, as its save_to_disk has written it: show the text around a token "
        "(needs --tokenizer)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE.safetensors",
        help="parameters that the memory does not hold: embeddings, norms, layers that were not recorded",
    )
    parser.add_argument(
        "--target", type=int, metavar="N", help="the class whose logit counts (default: the predicted one)"
    )
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="ask these layers only (default: all)")


def _replay_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "--method",
        choices=("exact", "preview"),
        default="exact",
        help="preview: without the replay that Adam and its like need; most of the same patterns, rough sums "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--cache", action="store_true", help="keep what a replay finds beside the memory, for the same question again"
    )


def _attend_arguments(parser: _Parser) -> None:
    _question_arguments(parser)
    _replay_arguments(parser)
    parser.add_argument("--top", type=int, default=10, metavar="K", help="patterns per query and layer (default: 10)")
    parser.add_argument(
        "--by",
        choices=CRITERIA,
        default="contribution",
        metavar="CRITERION",
        help=f"what ranks the patterns: {', '.join(CRITERIA)} (default: %(default)s)",
    )
    parser.add_argument("--smallest", action="store_true", help="the smallest by that instead of the largest")
    parser.add_argument("--sum-by", metavar="COLUMN", help="add totals per value of a column, such as step or sample")


def _influence_arguments(parser: _Parser) -> None:
    _question_arguments(parser)
    parser.add_argument(
        "--of", choices=MEASURES, default="margin", help="what would have changed of the target (default: %(default)s)"
    )
    parser.add_argument(
        "--method",
        choices=tuple(METHODS),
        default="decayed",
        help="how it is estimated, see below (default: %(default)s)",
    )
    parser.add_argument(
        "--per",
        choices=UNITS,
        help="what has an influence: samples, or their tokens (default: sample; with --passages token)",
    )
    parser.add_argument(
        "--top", type=int, default=10, metavar="K", help="of those that raised and that lowered it most (default: 10)"
    )
    parser.add_argument("--sum-by", metavar="COLUMN", help="add totals per value of a column of the samples")
    parser.add_argument("--no-cache", action="store_true", help="keep nothing of what is fitted beside the memory")


def _suspects_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "-k", "--top", type=int, default=100, metavar="K", help="samples to list (default: %(default)s)"
    )


def _report_arguments(parser: _Parser) -> None:
    _question_arguments(parser)
    _replay_arguments(parser)
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="to write (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=Path, metavar="FILE.npy", help="the training images by dataset row, [n, c, h, w] or [n, h, w]"
    )
    parser.add_argument("--labels", type=Path, metavar="FILE.npy", help="the true class number of each query")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="names of the classes, or one file, a line each")
    parser.add_argument(
        "--column", metavar="COLUMN", help="draw and count votes of its totals (default: label, class or document)"
    )
    parser.add_argument(
        "--top", type=int, default=8, metavar="K", help="samples per query, layer and ranking (default: 8)"
    )
    parser.add_argument("--title", metavar="TEXT", help="the page's heading")
    parser.add_argument(
        "--influence",
        choices=("decayed", "cosine", "none"),
        help="how the page estimates which samples would have changed a prediction; decayed foretells it best, and "
        "fits first (default: cosine, where the run named its samples)",
    )


def _verify_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        metavar="X",
        help="exit with status 1 unless every layer's relative error is below it (default: %(default)g)",
    )
    parser.add_argument(
        "--deep", action="store_true", help="first compare every file with its checksums, and name those that differ"
    )


def _no_arguments(parser: _Parser) -> None:
    """Beyond the memory's path there are none."""


ARGUMENTS = {
    "demo": ("train a small network, record it, draw what two predictions attend to", _demo_arguments),
    "info": ("what a memory holds: layers, patterns, steps, columns", _no_arguments),
    "verify": ("rebuild the trained weights from the memory and compare", _verify_arguments),
    "compact": ("write a memory in fewer and smaller files", _compact_arguments),
    "attend": ("which training patterns a model's outputs attend to", _attend_arguments),
    "influence": ("which training samples would have changed a model's outputs: an estimate", _influence_arguments),
    "suspects": ("the training samples that were hardest to fit", _suspects_arguments),
    "report": ("what some predictions rest on, as one HTML file", _report_arguments),
}
