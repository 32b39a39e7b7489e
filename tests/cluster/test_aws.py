"""cluster.yaml against an imitation of AWS: it is asked for what the file says, and no more."""

from __future__ import annotations

import importlib.util

import pytest
import yaml

from tests.cluster.aws_session import MY_ADDRESS
from tests.cluster.namespace import ROOT, enter, why_not

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the imitation was asked for, by `ray up cluster.yaml` as it stands and filled in."""
    for name in ("boto3", "moto"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'moto[server]' boto3")
    if reason := why_not():
        pytest.skip(f"not without a network that has loopback only: {reason}")
    return enter("tests.cluster.aws_session", tmp_path_factory.mktemp("aws"), timeout_s=400)


@pytest.fixture
def head(seen):
    """The one machine that was asked for."""
    (found,) = seen["instances"]
    return found


@pytest.fixture
def written():
    """The head as the file has it."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return config["available_node_types"][config["head_node_type"]]["node_config"]


def test_nothing_is_started_before_the_values_are_filled_in(seen):
    status, out = seen["untouched"]
    assert status != 0
    assert "Failed to detect a security group" in out
    assert seen["before"] == []


def test_one_head_is_asked_for_with_the_image_type_and_zone_of_the_file(head, written):
    assert head["ImageId"] == "ami-12c6146b"
    assert head["InstanceType"] == written["InstanceType"]
    assert head["Placement"]["AvailabilityZone"] == "us-east-1a"


def test_its_tags_name_the_cluster_the_project_and_the_owner(head, written):
    tags = {one["Key"]: one["Value"] for one in head["Tags"]}
    ours = {one["Key"]: one["Value"] for one in written["TagSpecifications"][0]["Tags"]}
    assert set(ours) == {"project", "owner"}
    assert ours.items() <= tags.items()
    assert tags["ray-cluster-name"] == "selffl"
    assert tags["ray-node-type"] == "head"


def test_it_is_in_the_group_that_was_named_and_no_group_opens_ssh_to_the_world(seen, head):
    assert [one["GroupId"] for one in head["SecurityGroups"]] == [seen["group"]]
    # Ray would make a group of its own, open to 0.0.0.0/0, and adds rules to one without any.
    assert {one["GroupName"] for one in seen["groups"]} == {"default", "selffl"}
    ranges = [
        (rule.get("FromPort"), one["CidrIp"])
        for group in seen["groups"]
        for rule in group["IpPermissions"]
        for one in rule["IpRanges"]
    ]
    assert ranges == [(22, MY_ADDRESS)]


def test_its_disk_is_encrypted_and_ends_with_it(seen, head, written):
    (disk,) = seen["volumes"]
    asked = written["BlockDeviceMappings"][0]["Ebs"]
    assert (disk["Size"], disk["VolumeType"]) == (asked["VolumeSize"], asked["VolumeType"])
    assert disk["Encrypted"]
    assert head["BlockDeviceMappings"][0]["Ebs"]["DeleteOnTermination"]


def test_the_launcher_then_turns_to_the_head_by_ssh_only(seen, head):
    lines = seen["dialled"].splitlines()
    assert lines
    assert all("/ssh -tt" in one and f"ubuntu@{head['PublicIpAddress']}" in one for one in lines)
