"""``ray up cluster.yaml`` against moto's imitation of AWS, in a namespace, until a head is there.

ssh and rsync are put out of reach: the imitation's addresses are invented.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.cluster.namespace import RAY, ROOT, run

PORT = 5555
ACCOUNT = {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
MY_ADDRESS = "203.0.113.7/32"
STUB = '#!/bin/sh\necho "$0 $*" >> "$DIALLED"\nexit 255\n'
WAIT_S = 150


def main(folder: Path) -> dict[str, Any]:
    """Start the imitation and the launcher; what AWS was asked for."""
    os.environ.update(ACCOUNT)
    no_way_out(folder)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(PORT)],
        env=os.environ | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
        stdout=(folder / "moto.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    wait(lambda: "Running on" in (folder / "moto.log").read_text())
    import boto3

    ec2 = boto3.client("ec2")
    make_token()
    untouched = run(*RAY, "up", "-y", "--no-config-cache", "cluster.yaml", cwd=ROOT)
    before = ec2.describe_instances()["Reservations"]
    group = make_group(ec2)
    config = filled_in(folder, group)
    launcher = subprocess.Popen(
        [*RAY, "up", "-y", "--no-config-cache", str(config)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=(folder / "up.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def dialled() -> bool:
        assert launcher.poll() is None, (folder / "up.log").read_text()
        return bool((folder / "dialled").read_text())

    wait(dialled)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    reservations = ec2.describe_instances()["Reservations"]
    instances = [one for r in reservations for one in r["Instances"]]
    disks = [d["Ebs"]["VolumeId"] for one in instances for d in one["BlockDeviceMappings"]]
    seen = {
        "untouched": untouched,
        "before": before,
        "group": group,
        "instances": instances,
        "groups": ec2.describe_security_groups()["SecurityGroups"],
        "volumes": ec2.describe_volumes(VolumeIds=disks)["Volumes"],
        "dialled": (folder / "dialled").read_text(),
        "up": (folder / "up.log").read_text(),
    }
    server.kill()
    server.wait()
    return plain(seen)


def plain(value: Any) -> Any:
    """Without dates, which JSON does not know."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def no_way_out(folder: Path) -> None:
    """Put stubs before ssh and rsync, which note whom they were to reach."""
    stubs = folder / "stubs"
    stubs.mkdir()
    for name in ("ssh", "scp", "rsync"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    (folder / "dialled").touch()
    os.environ |= {"PATH": f"{stubs}:{os.environ['PATH']}", "DIALLED": str(folder / "dialled")}


def make_group(ec2: Any) -> str:
    """The security group that the comments of cluster.yaml tell to make."""
    group: str = ec2.create_security_group(GroupName="selffl", Description="selffl_ray cluster")[
        "GroupId"
    ]
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22}
    within = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    rules = [{**ssh, "IpRanges": [{"CidrIp": MY_ADDRESS}]}, within]
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=rules)
    return group


def filled_in(folder: Path, group: str) -> Path:
    """cluster.yaml with what a person fills in; everything else is as it stands."""
    text = (ROOT / "cluster.yaml").read_text()
    path = folder / "cluster.yaml"
    path.write_text(text.replace("sg-FILL-IN", group).replace("ami-FILL-IN", "ami-12c6146b"))
    return path


def make_token() -> None:
    """Ray's launcher copies it to the head."""
    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)


def wait(condition: Any) -> None:
    """Until it holds; not for ever."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "AWS was asked for no head"
        time.sleep(0.3)
