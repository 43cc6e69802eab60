"""A program that restarts itself under a real systemd, with the unit of the documentation."""

from __future__ import annotations

from pathlib import Path

from tests.booted import ENVIRONMENT, PYTHON, Booted
from tests.service.test_booted import UNITS, asked
from tests.support import write_code

SERVER = """\
import asyncio, signal
import hotport
from app import VERSION

async def handler(stream):
    await stream.receive()
    await stream.send(f"{VERSION}\\n".encode())

async def main():
    async with hotport.serve(handler, bind="tcp://127.0.0.1:8000", restart_on_hup=True) as server:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.close)
        await server.wait_closed()

asyncio.run(main())
"""

HERE = """\
[Unit]
DefaultDependencies=no
[Service]
User=root
BindPaths={directory}
ProtectHome=no
WorkingDirectory=
WorkingDirectory={directory}
Environment=PWD={directory} {environment}
ExecStart=
ExecStart={python} server.py
StandardOutput=append:{directory}/server.log
StandardError=append:{directory}/server.log
"""


def test_new_process_is_the_main_one_and_the_unit_never_fails(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    write_code(tmp_path / "app.py", "VERSION = 'one'\n")
    units = {
        "restarting.service": (UNITS / "restarting.service").read_text(),
        "restarting.service.d/here.conf": HERE.format(directory=tmp_path, environment=ENVIRONMENT, python=PYTHON),
    }
    with Booted(tmp_path, units) as system:
        system.run("systemctl", "start", "restarting")
        pids = [system.show("restarting")["MainPID"]]
        with asked(system, tmp_path) as fates:
            for version in ("two", "three"):
                write_code(tmp_path / "app.py", f"VERSION = '{version}'\n")
                system.run("systemctl", "reload", "restarting")
                system.run("sh", "-c", f"while kill -0 {pids[-1]}; do sleep 0.05; done 2>/dev/null")
                shown = system.show("restarting")
                assert shown["ActiveState"] == "active", (tmp_path / "server.log").read_text()
                assert shown["NRestarts"] == "0"
                pids.append(shown["MainPID"])
            write_code(tmp_path / "app.py", "raise SystemExit(3)\n")
            system.run("systemctl", "reload", "restarting")
            system.run(
                "sh", "-c", "until systemctl show restarting -p StatusText | grep -q aborted; do sleep 0.05; done"
            )
            shown = system.show("restarting")
        assert len(set(pids)) == 3
        assert (shown["MainPID"], shown["ActiveState"]) == (pids[-1], "active")
        assert {"one"} < fates.keys() <= {"one", "two", "three"}, fates
        system.run("systemctl", "stop", "restarting")
        assert system.show("restarting")["Result"] == "success"
