"""The manifests of `deploy/`: what their schemas say, and what their commands do."""

import copy
import importlib
import json
import re
import shlex
from pathlib import Path

import batches
import jsonschema
import pytest
import yaml

from kvlock_jax.cli.fleet import _numbers, _resources
from kvlock_jax.cli.main import _parser

ROOT = Path(__file__).parents[1]
MANIFESTS = {path.stem: yaml.safe_load(path.read_text()) for path in ROOT.glob("deploy/*.yaml")}


def schema(name):
    return json.loads((ROOT / "tests" / "data" / "schemas" / f"{name}.json").read_text())


def errors(name, manifest):
    found = jsonschema.Draft202012Validator(schema(name)).iter_errors(manifest)
    return [error.message for error in found]


@pytest.mark.parametrize("name", MANIFESTS)
def test_schemas_hold(name, monkeypatch):
    assert errors(name, MANIFESTS[name]) == []
    assert re.search(r"github.com/\S+ [0-9a-f]{40}", schema(name)["$comment"])
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    cut = importlib.import_module("deploy_schemas").cut
    again = cut(schema(name), [MANIFESTS[name]])  # raises where the manifest has what they had not
    assert again.items() <= schema(name).items()


def paths(value, path=()):
    """Where the objects of a manifest are."""
    if isinstance(value, dict):
        yield path
    if isinstance(value, (dict, list)):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(below, (*path, key))


FREE = {"metadata", "rayStartParams", "nodeSelector", "requests", "limits"}
"""Objects whose keys their owner chooses, or that no schema describes."""


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_misspelt_field_fails(name):
    places = [path for path in paths(MANIFESTS[name]) if not path or path[-1] not in FREE]
    assert len(places) > 2
    for path in places:
        manifest = copy.deepcopy(MANIFESTS[name])
        place = manifest
        for key in path:
            place = place[key]
        place["tolerationz"] = place.pop(next(iter(place)))
        assert any(
            "tolerationz" in error or "valid under" in error for error in errors(name, manifest)
        ), path


def texts(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for below in value.values() if isinstance(value, dict) else value:
            yield from texts(below)


def flags(name, bucket, index=0):
    """The flags of a manifest's one command, as the command reads them."""
    found = [text for text in texts(MANIFESTS[name]) if "kvlock batch" in text]
    assert len(found) == 1
    line = found[0].replace("\\\n", " ").partition("kvlock batch")[2]
    flags, _, rest = line.partition("||")
    assert rest.strip() == "[ $? -eq 1 ]"
    flags = flags.replace("gs://BUCKET", str(bucket)).replace("$JOB_COMPLETION_INDEX", str(index))
    assert not re.search(r"[A-Z]{4,}|\$", re.sub(r"\{.*?\}", "", flags.replace(str(bucket), "")))
    return _parser().parse_args(["batch", *shlex.split(flags)])


def test_ray_has_the_machines_that_the_command_asks_for():
    args = flags("rayjob", "/bucket")
    cluster = MANIFESTS["rayjob"]["spec"]["rayClusterSpec"]
    group = next(one for one in cluster["workerGroupSpecs"] if one["groupName"] == "v6e")
    least, most = _numbers(args.replicas)
    assert args.ray == "" and least <= most == group["maxReplicas"]
    chips = group["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert _resources(args.ray_resources) == {"TPU": int(chips)}
    assert args.batch_size == int(chips)
    images = {text for text in texts(MANIFESTS["rayjob"]) if text.startswith("rayproject/")}
    assert images == {f"rayproject/ray:{cluster['rayVersion']}-py312"}


def test_a_recovered_job_has_no_shard():
    args = flags("skypilot", "/bucket")
    assert (args.num_shards, args.shard_index, args.ray, args.overwrite) == (1, 0, None, False)


def test_shards_do_every_edit_once(tmp_path):
    _, good = batches.forty(tmp_path)
    job = MANIFESTS["jobset"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    done = 0
    for index in range(job["completions"]):
        args = flags("jobset", tmp_path, index)
        assert args.num_shards == job["completions"] == job["parallelism"]
        shard = args.shard_index, args.num_shards
        summary = batches.do(args.manifest, args.save_dir, shard=shard)
        assert summary.done and not summary.skipped
        done += summary.done
    assert done == len(good)
    assert {path.stem for path in (tmp_path / "out").glob("*.mkv")} == set(good)
