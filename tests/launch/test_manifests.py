"""Kubernetes manifests against the schemas of JobSet, Job and Pod: fields, types, legal values."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

LAUNCH = Path(__file__).parents[2] / "launch"
MANIFESTS = sorted(LAUNCH.glob("k8s*.yaml"))
HOSTS = ("spec", "replicatedJobs", 0, "template", "spec")
CONTAINER = (*HOSTS, "template", "spec", "containers", 0)
QUANTITIES = ("limits", "requests")  # maps from a resource's name, which may be any, to a quantity

Place = tuple[str | int, ...]


def problems(manifest: dict[str, Any]) -> list[str]:
  """What Kubernetes would reject; unknown fields too, which it drops by default."""
  found = [
    f"{name}: {manifest.get(name)}"
    for name, legal in (("apiVersion", "jobset.x-k8s.io/v1alpha2"), ("kind", "JobSet"))
    if manifest.get(name) != legal
  ]
  # the import takes seconds, and every process of the tests collects this file
  from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

  try:
    strict: dict[str, Any] = {"extra": "forbid", "by_alias": True, "by_name": False}
    JobsetV1alpha2JobSet.model_validate(as_models(manifest), **strict)
  except ValidationError as error:
    found += [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
  return found


def as_models(value: Any) -> Any:
  """The manifest with quantities, numbers or strings, in the shape that their model has."""
  if isinstance(value, list):
    return [as_models(one) for one in value]
  if not isinstance(value, dict):
    return value
  return {
    name: {resource: {"actual_instance": amount} for resource, amount in field.items()}
    if name in QUANTITIES
    else as_models(field)
    for name, field in value.items()
  }


def load(path: Path) -> dict[str, Any]:
  return yaml.safe_load(path.read_text())


def fields(value: Any, place: Place = ()) -> Iterator[Place]:
  """The places of all fields whose names a schema knows."""
  if isinstance(value, dict) and not (place and place[-1] in QUANTITIES):
    for name, one in value.items():
      yield (*place, name)
      yield from fields(one, (*place, name))
  elif isinstance(value, list):
    for number, one in enumerate(value):
      yield from fields(one, (*place, number))


def changed(manifest: dict[str, Any], place: Place, **change: Any) -> dict[str, Any]:
  """A copy in which the field is renamed to `name`, or has another `value`."""
  result = copy.deepcopy(manifest)
  inside: Any = result
  for part in place[:-1]:
    inside = inside[part]
  value = inside.pop(place[-1])
  inside[change.get("name", place[-1])] = change.get("value", value)
  return result


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_valid(path):
  assert problems(load(path)) == []


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_any_misspelt_field_is_found(path):
  manifest = load(path)
  places = list(fields(manifest))
  assert len(places) > 40
  misspelt = lambda place: changed(manifest, place, name=f"{place[-1]}x")
  assert [place for place in places if not problems(misspelt(place))] == []


@pytest.mark.parametrize(
  ("place", "value", "says"),
  [
    (("apiVersion",), "jobset.x-k8s.io/v1", "apiVersion"),
    (("kind",), "Jobset", "kind"),
    (("spec", "failurePolicy", "maxRestarts"), "20", "valid integer"),
    (("spec", "replicatedJobs", 0, "name"), None, "valid string"),
    ((*HOSTS, "completionMode"), "Index", "'Indexed'"),
    ((*HOSTS, "template", "spec", "restartPolicy"), "OnError", "'OnFailure'"),
    ((*CONTAINER, "env", 1, "value"), 4, "valid string"),
    ((*CONTAINER, "command"), "bash -c", "valid list"),
    ((*CONTAINER, "ports", 0, "containerPort"), "8476", "valid integer"),
    ((*CONTAINER, "resources", "limits", "nvidia.com/gpu"), [8], "nvidia.com/gpu"),
  ],
)
def test_a_wrong_value_is_found(place, value, says):
  found = problems(changed(load(LAUNCH / "k8s_jobset.yaml"), place, value=value))
  assert found
  assert all(says in problem for problem in found)
