"""`inferwatch guards check` and `guards train`: what the configured guards let through, and a classifier of one's own.

No text leaves memory: state, record, report and output know texts by file and row. `--show-text` shows the missed
attacks and the false alarms on a terminal, and nowhere else.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer

from inferwatch.config import Config, load, settings_digest
from inferwatch.options import ConfigOption, JsonOption

if TYPE_CHECKING:  # each command loads its own room
    from collector.guards.cases import Cases
    from collector.guards.check import Said
    from collector.guards.check_record import CheckRecord
    from collector.guards.figures import Interval
    from collector.signing import Signer

SHOWN_CHARS_MAX: Final = 200


def check(  # noqa: PLR0917  # the options of the command line
    datasets: Annotated[
        list[Path] | None, typer.Argument(help="CyberSecEval JSON, JSONL, CSV, folders; none: texts of our own.")
    ] = None,
    harmless: Annotated[
        list[Path] | None, typer.Option(help="Harmless texts of your own traffic: .txt, a text a line, or as above.")
    ] = None,
    fpr: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="False-positive rate to propose thresholds for.")
    ] = 0.01,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML page with curves here.")] = None,
    disguised: Annotated[int, typer.Option(min=0, help="Attacks, and harmless texts, to disguise in every way.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the sample that is disguised.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever an earlier run has left.")] = False,
    show_text: Annotated[
        bool, typer.Option("--show-text", help="Show missed attacks and false alarms, on a terminal only.")
    ] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge texts with known answers by the configured guards, and say what they catch, miss and wrongly block.

    A run that was ended goes on where it stopped. The record goes below the data folder, signed with
    collector.evidence.signing_key_file; `inferwatch doctor` reads it.

    Example: inferwatch guards check prompt_injection.json mitre_frr.json --harmless own.txt --report guards.html
    """
    if show_text and (as_json or not sys.stdout.isatty()):
        raise ValueError("--show-text shows prompts on a terminal only: leave out --json, pipes and files")
    from collector.guards.assessment import assess  # noqa: PLC0415
    from collector.guards.check import FORMAT as PLAN_FORMAT  # noqa: PLC0415
    from collector.guards.check import Plan, State, judge_all, unsparing  # noqa: PLC0415
    from collector.guards.check_record import FOLDER, FORMAT, CheckRecord, signed, write  # noqa: PLC0415
    from collector.guards.stack import GuardStack  # noqa: PLC0415

    settings = load(config)
    found = _cases(datasets or [], harmless or [])
    folder = settings.data_dir / FOLDER
    stack = GuardStack(unsparing(settings.collector.guards))
    try:
        policy = settings_digest(settings.collector.guards)
        plan = Plan(PLAN_FORMAT, dict(found.digests), stack.versions, policy, disguised, seed)
        file = folder / f"check-{plan.digest}.state"
        if fresh:
            file.unlink(missing_ok=True)
        with State(file, plan) as state:
            with progress("judging") as tick:
                judge_all(stack, found, plan, state, tick)
            said = state.said
            record = CheckRecord(
                format=FORMAT,
                at=datetime.now(UTC),
                inferwatch=version("inferwatch"),
                plan=plan,
                attacks=sum(case.attack for case in found.cases),
                harmless=sum(not case.attack for case in found.cases),
                fpr=fpr,
                seen_in_training=not datasets and not harmless,
                assessment=assess(found.cases, said, fpr=fpr),
            )
            record = signed(record, _signer(settings))
            place = write(record, folder)
            state.remove()
    finally:
        stack.close()
    if report is not None:
        from inferwatch.guards_report import page  # noqa: PLC0415

        report.write_text(page(record), encoding="utf-8")
    if as_json:
        typer.echo(msgspec.json.encode(record).decode())
        return
    _tell(record, place)
    if show_text:
        _show(found, said)


def train(
    dataset: Annotated[Path, typer.Argument(help="Folder of .jsonl or .jsonl.gz rows.")],
    out: Annotated[Path, typer.Option(help="Weights to write, safetensors; the model card goes beside them.")],
    seed: Annotated[int, typer.Option(help="The same data and seed give the same bytes.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")] = False,
) -> None:
    """Train the injection guard on data of your own. Needs `pip install 'inferwatch[guards]'`; takes minutes.

    Example: inferwatch guards train data/ --out own.safetensors
    """
    try:
        from collector.guards.train import train_guard  # noqa: PLC0415
    except ModuleNotFoundError as missing:
        raise ValueError(f"training needs {missing.name}: pip install 'inferwatch[guards]'") from None
    start_s = time.monotonic()

    def tell(what: str) -> None:
        if not quiet:
            typer.echo(f"{time.monotonic() - start_s:6.0f} s  {what}", err=True)

    train_guard(dataset, out, seed, tell)


def _cases(datasets: Sequence[Path], harmless: Sequence[Path]) -> "Cases":
    from collector.guards.cases import own_cases, read_cases  # noqa: PLC0415

    return read_cases(datasets, harmless) if datasets or harmless else own_cases()


def _signer(settings: Config) -> "Signer | None":
    from collector.signing import Signer  # noqa: PLC0415

    file = settings.collector.evidence.signing_key_file
    return None if file is None else Signer.load(file)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; nothing where that is no terminal."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn  # noqa: PLC0415

    console = Console(stderr=True)
    with Progress(
        what,
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _tell(record: "CheckRecord", place: Path) -> None:
    typer.echo(f"{record.attacks} attacks, {record.harmless} harmless texts; shares in %, with 95 % intervals")
    for one in record.assessment.verdicts:
        bypass = "" if one.bypass is None else f"; {_percent(one.bypass)} % of attacks pass plain or in some disguise"
        typer.echo(f"\n{one.guard}: {one.ms_per_kb:.2f} ms per KB{bypass}")
        typer.echo(f"  {'':24}{'caught':>20} of {'':6}{'wrongly blocked':>20} of {'':6}{'AUROC':>20}  errors")
        stages = one.by_stage if len(one.by_stage) > 1 else []
        for group in (one.overall, *stages, *one.by_disguise):
            auroc = "–" if group.auroc is None else str(group.auroc)
            typer.echo(
                f"  {group.name:24}{_percent(group.tpr):>20} of {group.attacks:<6}{_percent(group.fpr):>20} of "
                f"{group.harmless:<6}{auroc:>20}  {group.errors}"
            )
        for limit in one.thresholds:
            typer.echo(
                f"  threshold {limit.score:.6f} ({limit.stage}, {limit.lang}) for {record.fpr:.2%} false alarms: "
                f"on new texts {_percent(limit.fpr_held_out)} %; catches {_percent(limit.tpr)} %"
            )
    typer.echo("")
    for pair in record.assessment.agreement:
        agreed = "not to be measured" if pair.kappa is None else f"kappa {pair.kappa:.2f}"
        typer.echo(f"agreement of {pair.first} and {pair.second} on {pair.texts} texts: {agreed}")
    if record.seen_in_training:
        typer.echo("These are texts of the training itself: the figures flatter the classifier.")
    if not record.signature:
        typer.echo("The record is not signed: set collector.evidence.signing_key_file.")
    typer.echo(f"The record: {place}")


def _percent(share: "Interval | None") -> str:
    return "–" if share is None else f"{share.value:.1%} ({share.low:.1%}–{share.high:.1%})".replace("%", "")


def _show(found: "Cases", said: Sequence["Said"]) -> None:
    """What the stack got wrong, with the text, made safe for a terminal."""
    from collector.guards.check import PLAIN, STACK  # noqa: PLC0415
    from dashboards.markup import shown  # noqa: PLC0415

    for one in said:
        case = found.cases[one.case]
        if one.guard == STACK and one.disguise == PLAIN and one.bad is not case.attack:
            what = "missed" if case.attack else "wrongly blocked"
            typer.echo(f"{what}  {case.place}  {one.score:.3f}  {shown(case.text, SHOWN_CHARS_MAX)}")
