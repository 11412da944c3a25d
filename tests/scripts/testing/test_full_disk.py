from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MOUNT = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs"]
SPACE = ["unshare", "--user", "--map-root-user", "--mount"]

FULL = """if True:
    import json, subprocess, sys
    from pathlib import Path
    from sheily_train.scripts.testing.drill import PRELOADED, PROCESSES, Drill
    from sheily_train.scripts.testing.scenario import undisturbed
    from sheily_train.scripts.testing.workload import WORKLOADS

    class Full(Drill):
        def _finish(self):
            self.tolerated.add("ResourceError")
            self.worker, self.allow(self.scenario.workload.events)
            while not self.report.repeats["ResourceError"]:
                self.client, self.worker, self.listen(0.01)
            for folder in disks:
                subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
            super()._finish()

    def main():
        PROCESSES.set_forkserver_preload(PRELOADED)
        quiet, full = (Path(sys.argv[1]) / name for name in ("quiet", "full"))
        quiet.mkdir()
        expected = Drill(undisturbed(WORKLOADS[0]), None, quiet).run()
        for folder in disks:
            folder.mkdir(parents=True)
            subprocess.run([*json.loads(sys.argv[2]), folder], check=True)
        report = Full(undisturbed(WORKLOADS[0]), expected.ending, full).run()
        print(json.dumps([expected.reason, report.reason, report.repeats["ResourceError"]]))

    if __name__ == "__main__":
        disks = [Path(sys.argv[1]) / "full" / name for name in ("desk", "worker")]
        main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="name spaces are Linux")
def test_a_real_full_disk_is_told_and_what_follows_is_the_same_bits(tmp_path: Path) -> None:
    """Desk and worker on disks of 300 kB, in a name space of their own: the command says that there is no room; with
    room it goes on, to the bits of a run that always had some."""
    if subprocess.run([*SPACE, *MOUNT, str(tmp_path)], capture_output=True, check=False).returncode:
        pytest.skip("no name spaces with file systems of their own here")
    program = tmp_path / "program.py"
    program.write_text(FULL)
    done = subprocess.run(
        [*SPACE, sys.executable, program, tmp_path, json.dumps(MOUNT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    undisturbed, full, told = json.loads(done.stdout)
    assert (undisturbed, full) == ("", "")
    assert told >= 1
