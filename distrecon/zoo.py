"""python -m distrecon.zoo: train, import, describe, check, seal, compact and export model zoos."""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from distrecon import config as configuration
from distrecon import console
from distrecon.errors import UserError
from distrecon.zoos import Zoo, inspection, open_zoo
from distrecon.zoos.compact import compact as compact_zoo
from distrecon.zoos.format import MANIFEST
from distrecon.zoos.settings import named_zoos, read_config
from distrecon.zoos.storage import store
from distrecon.zoos.write import seal_zoo

EXAMPLES = """examples:
  python -m distrecon.zoo train --out zoos/digits
  python -m distrecon.zoo train --config cifar10_paper --set images.directory=data/cifar10 --out zoos/cifar10
  python -m distrecon.zoo import downloads/tune_zoo_svhn --images svhn --images-dir data/svhn --out zoos/svhn
  python -m distrecon.zoo info zoos/svhn
  python -m distrecon.zoo check zoos/svhn --images-dir data/svhn
  python -m distrecon.zoo seal zoos/older
  python -m distrecon.zoo compact s3://bucket/zoos/svhn
  python -m distrecon.zoo export zoos/svhn --model ID --out model.safetensors

exit codes: 0 done, 1 done but something was skipped or is unsound, 2 the request is wrong, 130 interrupted
(train and import continue when run again)
"""


def parser() -> console.Parser:
    parser = console.Parser(
        prog="distrecon.zoo",
        description="Train, import, describe, check, seal, compact and export model zoos.",
        epilog=EXAMPLES,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _train_options(_command(commands, "train", "train a zoo, or continue one that was interrupted"))
    _import_options(_command(commands, "import", "import a published zoo, or append to one"))
    info = _command(commands, "info", "counts, sizes, accuracies")
    info.add_argument("zoo", help="folder or URL of the zoo")
    _address_option(info)
    check = _command(commands, "check", "compare all files, read every row, recompute a sample of accuracies")
    check.add_argument("zoo", help="folder or URL of the zoo")
    check.add_argument("--sample", type=int, default=64, help="states to recompute (default: 64)")
    check.add_argument("--images-dir", "--images", metavar="DIR", help="where its images lie, if not in the zoo")
    console.module_option(check)
    _address_option(check)
    compact = _command(commands, "compact", "join a zoo's many small files to few; its rows and their order stay")
    compact.add_argument("zoo", help="folder or URL of the zoo; nothing else may read it meanwhile")
    _address_option(compact)
    seal = _command(commands, "seal", "seal the files of an earlier version's zoo, or an edited zoo.json")
    seal.add_argument("zoo", help="folder or URL of the zoo")
    export = _command(commands, "export", "write one model as safetensors")
    export.add_argument("zoo", help="folder or URL of the zoo")
    export.add_argument("--model", required=True, metavar="ID", help="the model's id in the zoo")
    export.add_argument("--epoch", type=int, help="which of its states (default: the last)")
    export.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file to write")
    return parser


def _command(commands: "argparse._SubParsersAction[console.Parser]", name: str, text: str) -> console.Parser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument(
        "--seed", type=console.seed, help="seed of everything random (default: 0, or the configuration's)"
    )
    command.add_argument("--smoke", action="store_true", help="a tiny instance, to check an installation")
    console.output_options(command)
    return command


def _address_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--address", help="do it on a Ray cluster: auto, or HOST:PORT (default: in threads, here)")


def _ray_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--address", help="join a Ray cluster: auto, or HOST:PORT (default: a local session)")
    command.add_argument("--gpus-per-task", type=float, default=0.0, help="share of a GPU for each task (default: 0)")


def _train_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="ZOO", help="folder or URL of the zoo")
    command.add_argument(
        "--config", metavar="NAME|FILE", help=f"{', '.join(named_zoos())}, or a YAML file (default: digits)"
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a dotted setting laid over the configuration"
    )
    command.add_argument(
        "--module", metavar="PACKAGE.FILE:FACTORY", help="a torch module to train: the setting architecture.module"
    )
    _store_option(command)
    _ray_options(command)


def _store_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--store-images",
        action=argparse.BooleanOptionalAction,
        help="put the images into the zoo (default: if they lie in a directory and are not very many)",
    )


def _import_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", nargs="?", help="Ray Tune tree, folder of checkpoint files, or one such file")
    command.add_argument("--out", required=True, metavar="ZOO", help="folder or URL of the zoo to make or append to")
    command.add_argument("--epochs", help="only these, e.g. 20,30,40,50 (default: all)")
    command.add_argument("--architecture", help="where several have the same weights")
    command.add_argument("--activation", help="where the source does not tell it")
    command.add_argument("--module", metavar="PACKAGE.FILE:FACTORY", help="the torch module whose state dicts they are")
    command.add_argument("--images", metavar="NAME", help="image set the models were trained on")
    command.add_argument("--images-dir", metavar="DIR", help="where its files lie")
    _store_option(command)
    command.add_argument("--percent", action="store_true", help="the source's accuracies are percentages")
    command.add_argument("--name", help="the zoo's name (default: the source's)")
    command.add_argument("--strict", action="store_true", help="stop at the first thing that would be skipped")
    _ray_options(command)


# -- the commands -----------------------------------------------------------------------------------------------------


def _connect(args: argparse.Namespace) -> dict[str, float]:
    """Joins Ray; the resources of a task."""
    from distrecon.cluster import session

    session.connect(args.address, verbose=args.verbose)
    if args.gpus_per_task > (has := session.available()["GPU"]) and not session.grows():
        raise UserError(
            f"--gpus-per-task {args.gpus_per_task:g}: the whole cluster has {has:g} GPUs; lower it, or leave it out"
        )
    return {"num_cpus": 1, "num_gpus": args.gpus_per_task} if args.gpus_per_task else {"num_cpus": 1}


def _join(args: argparse.Namespace) -> None:
    """Joins a Ray cluster, if one was named."""
    if args.address is not None:
        from distrecon.cluster import session

        session.connect(args.address, verbose=args.verbose)


def _shower(stage: console.Progress, what: str = "models") -> Callable[[int, int, float], None]:
    """Shows how far it is and how long still, from the models done since this call began."""
    first: list[int] = []

    def show(done: int, total: int, seconds: float) -> None:
        first.append(done)
        share = (done - first[0]) / max(total - first[0], 1)
        stage.show(f"{done} of {total} {what}, {console.time_left(share, seconds)}")

    return show


def train(args: argparse.Namespace) -> console.Answer:
    """Trains, continues or finds a zoo."""
    from distrecon.recording import record_zoo
    from distrecon.zoos.train import ensure

    config = read_config(args.config or ("smoke" if args.smoke else "digits"))
    values = {} if args.seed is None else {"seed": args.seed}
    values |= {} if args.module is None else {"architecture.module": args.module}
    config = configuration.replace(config, values | configuration.parse_assignments(args.set), "--set")
    resources, stage, began = _connect(args), console.Progress("train"), time.time()
    there = store(args.out).exists(MANIFEST)
    zoo = ensure(config, args.out, _shower(stage), resources, args.store_images)
    excluded = len(zoo.info["excluded"])
    stage.done(
        f"{zoo.num_models} models, {zoo.num_states} states in {zoo.store}" + f", {excluded} diverged" * bool(excluded)
    )
    problem = None if there else record_zoo(zoo, "train", began, configuration.flatten(config))
    failed = excluded or problem
    return console.Answer(
        console.SOME_FAILED if failed else console.DONE, _not_recorded(problem), inspection.facts(zoo)
    )


def _not_recorded(problem: str | None) -> str:
    return f"MLflow   NOT RECORDED: {problem}" if problem else ""


def import_(args: argparse.Namespace) -> console.Answer:
    """Imports what can be, tells what cannot."""
    from distrecon.recording import record_zoo
    from distrecon.zoos.importing import REPORT, ImportOptions, import_zoo

    try:
        epochs = tuple(int(text) for text in args.epochs.split(",")) if args.epochs else None
    except ValueError:
        raise UserError(f"--epochs wants numbers like 20,30,40, not {args.epochs!r}") from None
    options = ImportOptions(
        epochs=epochs,
        architecture=args.architecture,
        activation=args.activation,
        images=args.images,
        images_directory=args.images_dir,
        store_images=args.store_images,
        name=args.name,
        seed=args.seed or 0,
        strict=args.strict,
        module=args.module,
        percent=args.percent,
    )
    with tempfile.TemporaryDirectory() as folder:
        source = _smoke_source(Path(folder)) if args.smoke and args.source is None else args.source
        if source is None:
            raise UserError("import wants a SOURCE: a Ray Tune tree, a folder of checkpoint files, or one such file")
        resources, stage, began = _connect(args), console.Progress("import"), time.time()
        report = import_zoo(source, args.out, options, _shower(stage), resources)
    stage.done(f"{report.models} models, {report.states} states into {report.zoo}")
    lines = [f"skipped {count:6}  {reason}" for reason, count in report.reasons.items()]
    if report.skipped:
        lines.append(f"each one is listed in {report.zoo}/{REPORT}")
    settings = {"source": str(source), **{k: v for k, v in dataclasses.asdict(options).items() if v is not None}}
    problem = record_zoo(open_zoo(args.out), "import", began, settings)
    code = console.SOME_FAILED if report.skipped or problem else console.DONE
    text = "\n".join(filter(None, [*lines, _not_recorded(problem)]))
    return console.Answer(code, text, dataclasses.asdict(report))


def _smoke_source(folder: Path) -> Path:
    """Two random models in files, for `import --smoke`."""
    import torch

    from distrecon.nets import architecture, initialise

    arch = architecture("zoo_cnn")
    for seed in (0, 1):
        state = arch.unflatten(initialise(arch, ["normal"], [seed])[0])
        torch.save({"model_state_dict": state, "activation": "tanh"}, folder / f"model{seed}_epoch_1.pt")
    (folder / "table.csv").write_text(
        "file,activation,train_acc,test_acc\nmodel0_epoch_1,tanh,.1,.1\nmodel1_epoch_1,tanh,.1,.1\n"
    )
    return folder


def info(args: argparse.Namespace) -> console.Answer:
    """Tells what a zoo is."""
    zoo = open_zoo(args.zoo)
    _join(args)
    return console.Answer(console.DONE, inspection.describe(zoo), inspection.facts(zoo))


def check(args: argparse.Namespace) -> console.Answer:
    """Tells what is wrong with a zoo."""
    zoo = open_zoo(args.zoo, module=args.module)
    _join(args)
    result = inspection.check(zoo, 4 if args.smoke else args.sample, args.seed or 0, args.images_dir)
    recomputed = (
        f"{result.recomputed} accuracies recomputed" if result.recomputed else f"none recomputed: {result.note}"
    )
    compared = f"{result.sealed} files compared with their seals"
    if result.unsealed:
        compared += f" ({result.unsealed} parts have none: zoo seal {args.zoo})"
    count = len(result.problems) or "no"
    lines = [*result.problems, f"{result.states} states read, {compared}, {recomputed}, {count} problems"]
    code = console.SOME_FAILED if result.problems else console.DONE
    return console.Answer(code, "\n".join(lines), dataclasses.asdict(result))


def seal(args: argparse.Namespace) -> console.Answer:
    """Seals what is not."""
    count = seal_zoo(args.zoo)
    return console.Answer(console.DONE, f"{count} files sealed in {args.zoo}", {"zoo": args.zoo, "sealed": count})


def compact(args: argparse.Namespace) -> console.Answer:
    """Joins small files."""
    zoo = open_zoo(args.zoo)
    _join(args)
    stage = console.Progress("compact")
    before, now = compact_zoo(zoo.store, progress=_shower(stage, "states"))
    stage.done(f"{before} files of states are {now} now")
    data = {"zoo": args.zoo, "files_before": before, "files": now}
    return console.Answer(console.DONE, f"{args.zoo}: {before} files of states, now {now}", data)


def export(args: argparse.Namespace) -> console.Answer:
    """Writes one model."""
    zoo: Zoo = open_zoo(args.zoo)
    epoch = inspection.export(zoo, args.model, args.out, args.epoch)
    data = {"model": args.model, "epoch": epoch, "file": args.out}
    return console.Answer(console.DONE, f"{args.model}, epoch {epoch}: {args.out}", data)


COMMANDS = {
    "train": train,
    "import": import_,
    "info": info,
    "check": check,
    "seal": seal,
    "compact": compact,
    "export": export,
}


def run(args: argparse.Namespace) -> console.Answer:
    try:
        return COMMANDS[args.command](args)
    except KeyboardInterrupt:
        hint = "run the same command again, and it continues" if args.command in ("train", "import", "compact") else ""
        raise KeyboardInterrupt(hint) from None


def main(argv: list[str] | None = None) -> int:
    return console.run_command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
