"""Search for inputs that break a promise, for as long as wanted: ``python tests/fuzz/run.py http 600``.

With atheris where there is one for the platform, which learns from the branches that an input takes;
else with mutations of the seeds. An input that fails is written to a file and named; give it in place of the seconds to
run it again: ``python tests/fuzz/run.py http build/fuzz/http-crash-1234``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)  # in place of this directory

NAMES = ("http", "websocket", "proxy", "envelope", "frames")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("seconds", help="how long to search; or a file: the input to run again")
    parser.add_argument("--engine", choices=("auto", "atheris", "mutations"), default="auto")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "fuzz", help="[default: build/fuzz]")
    parser.add_argument("--executions", type=int, default=0, help="stop after so many; 0: any number")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.seconds.isdigit():
        return _again(options.name, Path(options.seconds))
    if options.engine == "mutations" or (options.engine == "auto" and not importlib.util.find_spec("atheris")):
        return _mutations(options.name, int(options.seconds), options.executions, options.output)
    return _atheris(options.name, int(options.seconds), options.executions, options.output)


def _again(name: str, path: Path) -> int:
    from tests.fuzz.targets import TARGETS

    with TARGETS[name].opened() as one_input:
        one_input(path.read_bytes())
    print("nothing was broken")
    return 0


def _mutations(name: str, seconds: int, executions: int, output: Path) -> int:
    from tests.fuzz.mutate import search
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    with target.opened() as one_input:
        count, failed = search(one_input, target.seeds(), executions=executions or None, seconds=seconds)
    print(f"{name}: {count} executions")
    if failed is None:
        return 0
    path = output / f"{name}-crash-{hashlib.sha1(failed.data).hexdigest()[:12]}"
    path.write_bytes(failed.data)
    traceback.print_exception(failed.error)
    print(f"the input: {path}")
    return 1


def _atheris(name: str, seconds: int, executions: int, output: Path) -> int:
    """Never returns: libFuzzer ends the process, with status 0 if nothing was found."""
    import atheris

    with atheris.instrument_imports(include=["hotport", "websockets"]):
        from tests.fuzz.mutate import INPUT_BYTES_MAX
        from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    corpus = output / name
    corpus.mkdir(exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    with target.opened() as one_input:
        atheris.Setup(
            [
                sys.argv[0],
                f"-max_total_time={seconds}",
                f"-runs={executions or -1}",
                f"-max_len={INPUT_BYTES_MAX}",
                f"-artifact_prefix={output / name}-",
                "-timeout=20",  # seconds for one input
                "-rss_limit_mb=1024",
                "-print_final_stats=1",
                str(corpus),
            ],
            one_input,
        )
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
