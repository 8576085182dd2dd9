#!/usr/bin/env python3
"""Checks everything in this folder without a cluster: check.py --halfstep BINARY (needs requirements.txt, and kubectl or kustomize).

Renders base, overlays and chart; validates them strictly against the schemas of three versions of Kubernetes; finds what
schemas let through (rules.py), and proves by mistakes made on purpose that it does; parses every argument of every pod
with the real binary; lints chart and Dockerfile. Not here: whether pods do their work (faults/tests/kubernetes.rs).
"""

import argparse
import copy
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import helm_python as helm
import kubernetes_validate
import yaml

import rules

HERE = pathlib.Path(__file__).parent
OVERLAYS = ["base", "overlays/cpu", "overlays/gpu", "overlays/cert-manager", "overlays/jobset", "overlays/rdma"]
CHART = HERE / "helm/halfstep"
VERSIONS = ["1.30", "1.34", "1.37"]
# Schemas of these come with their operators.
FOREIGN = {"JobSet", "Certificate", "Issuer"}

# Values of the chart, and the kustomization that they should equal.
TWINS = [({}, "base"), ("values-cpu.yaml", "overlays/cpu"), ("values-gpu.yaml", "overlays/gpu")]
GOOD_VALUES = [
    {"pods": 1, "gpus": 8, "device": "cuda:0,1", "queue": "research"},
    {"certificates": {"certManager": True}, "data": {"claim": "mine"}},
    {"args": ["--threads=2", "--memory-budget=8GiB"], "tolerations": [{"operator": "Exists"}]},
]
BAD_VALUES = [
    {"pods": 0}, {"pods": "4"}, {"typo": 1}, {"image": {"tag": "with space"}}, {"device": "tpu"}, {"gpus": -1},
    {"memory": "16 GB"}, {"data": {"accessMode": "ReadOnlyMany"}}, {"args": ["threads=2"]}, {"job": ""},
    {"certificates": {"certmanager": True}},
]


class Report:
    def __init__(self):
        self.passed = self.failed = 0

    def check(self, what, problems):
        """One check: `problems` says what is wrong, one sentence each."""
        problems = list(problems)
        for problem in problems:
            print(f"FAILED {what}: {problem}")
        self.failed += bool(problems)
        self.passed += not problems


def kustomize(folder):
    tool = shutil.which("kustomize")
    command = [tool, "build"] if tool else [os.environ.get("KUBECTL", "kubectl"), "kustomize"]
    done = subprocess.run([*command, str(HERE / folder)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{folder}: {done.stderr.strip()}")
    return objects_of(done.stdout)


def chart(values):
    if isinstance(values, str):
        values = yaml.safe_load((CHART / values).read_text())
    rendered = helm.Chart.load(str(CHART)).render(values, name="halfstep", namespace="default")
    return [thing for text in rendered.values() for thing in objects_of(text)]


def objects_of(text):
    return [thing for thing in yaml.safe_load_all(text) if thing]


def schema_problems(objects, version):
    for thing in objects:
        if thing["kind"] in FOREIGN:
            continue
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except Exception as error:
            yield f'{thing["kind"]}/{thing["metadata"]["name"]}: {str(error)[:300]}'
    # Jobs inside a JobSet are Jobs.
    for name, spec in rules.jobs_of(thing for thing in objects if thing["kind"] == "JobSet"):
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "inner"}, "spec": spec}
        try:
            kubernetes_validate.validate(job, version, strict=True)
        except Exception as error:
            yield f"{name}: {str(error)[:300]}"


def normal(objects):
    """Objects by kind and name, without what tells Helm's from kustomize's."""
    result = {}
    for thing in copy.deepcopy(objects):
        labels = thing["metadata"].get("labels", {})
        for label in ["helm.sh/chart", "app.kubernetes.io/managed-by"]:
            labels.pop(label, None)
        annotations = thing["metadata"].get("annotations", {})
        annotations.pop("helm.sh/resource-policy", None)
        if not annotations:
            thing["metadata"].pop("annotations", None)
        if thing["kind"] == "Job":
            # kustomize leaves the template's labels to the base.
            thing["spec"]["template"]["metadata"]["labels"].pop("app.kubernetes.io/part-of", None)
        result[thing["kind"], thing["metadata"]["name"]] = thing
    return result


def differences(one, other, path=""):
    """Where two values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({**one, **other}, key=str):
            yield from differences(one.get(key), other.get(key), f"{path}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (left, right) in enumerate(zip(one, other)):
            yield from differences(left, right, f"{path}/{index}")
    elif one != other:
        yield f"{path}: {json.dumps(one)} here, {json.dumps(other)} by kustomize"


def argument_problems(objects, binary):
    """The real binary parses every argument before it comes to --help."""
    for name, spec in rules.jobs_of(objects):
        for container in spec["template"]["spec"]["containers"]:
            command = container["command"] + container["args"]
            if command[0] != "halfstep":
                yield f"{name}: starts {command[0]}, which is not in the image"
            given = subprocess.run([binary, *command[1:], "--help"], capture_output=True, text=True)
            if given.returncode != 0 or "Usage:" not in given.stdout:
                yield f"{name}: {given.stderr.strip()}"
            documented = {int(code) for code in re.findall(r"^ +(\d+)  ", given.stdout.partition("Exit codes:")[2], re.MULTILINE)}
            for rule in spec["podFailurePolicy"]["rules"]:
                for code in set(rule.get("onExitCodes", {}).get("values", [])) - documented:
                    yield f"{name}: podFailurePolicy names exit code {code}, the binary has {sorted(documented)}"
            # Without --help: nothing that is required is missing. It fails later, for want of files.
            environment = {**os.environ, "JOB_COMPLETION_INDEX": "0", "HALFSTEP_POD_FAILURES": ""}
            real = subprocess.run([binary, *elsewhere(command[1:])], capture_output=True, text=True, env=environment)
            if real.returncode not in [65, 78]:
                yield f"{name}: expected exit 65 or 78 for want of files, found {real.returncode}: {real.stderr.strip()}"


def elsewhere(arguments):
    """The same without opening ports that may be in use here."""
    return [argument for argument in arguments if not argument.startswith(("--health=", "--metrics="))]


def job_file_problems(objects, binary):
    """Every key of the job file is known: what is left to refuse is that there is no such model here."""
    for thing in objects:
        if thing["kind"] == "ConfigMap":
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "job.toml"
                path.write_text(thing["data"]["job.toml"])
                done = subprocess.run([binary, "plan", "--config", str(path)], capture_output=True, text=True)
            if done.returncode != 65 or "/data/model.onnx" not in done.stderr:
                yield f"expected only the model to be missing, found exit {done.returncode}: {done.stderr.strip()}"


def mistakes():
    """Ways to break the objects of base, and a word that the finding must have."""

    def job(change):
        def apply(objects):
            spec = next(thing for thing in objects if thing["kind"] == "Job")["spec"]
            change(spec, spec["template"]["spec"], spec["template"]["spec"]["containers"][0])
        return apply

    def without(kind):
        return lambda objects: [objects.remove(t) for t in objects[:] if t["kind"] == kind]

    def policy(change):
        return lambda objects: [change(t["spec"]) for t in objects if t["kind"] == "NetworkPolicy"]

    def service(change):
        return lambda objects: [change(t["spec"]) for t in objects if t["kind"] == "Service"]

    def replace(container, old, new):
        container["args"] = [argument.replace(old, new) for argument in container["args"]]

    return [
        (job(lambda s, p, c: s.update(maxFailedIndexes=5)), "maxFailedIndexes 5"),
        (job(lambda s, p, c: s.update(parallelism=3)), "differ"),
        (job(lambda s, p, c: s["successPolicy"]["rules"][0].update(succeededIndexes="0-4")), "index 4"),
        (job(lambda s, p, c: p.update(restartPolicy="OnFailure")), "restartPolicy"),
        (job(lambda s, p, c: s.update(podReplacementPolicy="TerminatingOrFailed")), "podReplacementPolicy"),
        (job(lambda s, p, c: s["podFailurePolicy"]["rules"][0]["onPodConditions"][0].pop("status")), "1.34"),
        (job(lambda s, p, c: s["podFailurePolicy"]["rules"][1]["onExitCodes"].update(containerName="x")), "container x"),
        (job(lambda s, p, c: s["podFailurePolicy"]["rules"][1]["onExitCodes"].update(values=[65, 75])), "tried again"),
        (job(lambda s, p, c: s["podFailurePolicy"]["rules"][1]["onExitCodes"].update(values=[78, 65])), "ascending"),
        (job(lambda s, p, c: p["volumes"].pop(0)), "no volume data"),
        (job(lambda s, p, c: c["volumeMounts"].pop()), "mounted nowhere"),
        (job(lambda s, p, c: c["volumeMounts"][0].update(mountPath="/tmp")), "two mounts"),
        (job(lambda s, p, c: c["lifecycle"]["preStop"]["sleep"].update(seconds=60)), "preStop"),
        (job(lambda s, p, c: p["tolerations"].pop()), "unreachable"),
        (job(lambda s, p, c: p["securityContext"].update(runAsUser=0)), "root"),
        (job(lambda s, p, c: p["securityContext"].pop("seccompProfile")), "seccomp"),
        (job(lambda s, p, c: p.pop("automountServiceAccountToken")), "token"),
        (job(lambda s, p, c: p.update(hostNetwork=True)), "hostNetwork"),
        (job(lambda s, p, c: p["volumes"][0].update(hostPath={"path": "/"})), "restricted"),
        (job(lambda s, p, c: c["securityContext"].pop("allowPrivilegeEscalation")), "privileges"),
        (job(lambda s, p, c: c["securityContext"].update(readOnlyRootFilesystem=False)), "image"),
        (job(lambda s, p, c: c["securityContext"]["capabilities"].update(drop=[])), "keeps capabilities"),
        (job(lambda s, p, c: c["securityContext"]["capabilities"].update(add=["IPC_LOCK"])), "adds capabilities"),
        (job(lambda s, p, c: p["volumes"][2]["secret"].update(secretName="x")), "secret x"),
        (job(lambda s, p, c: p["volumes"][2]["secret"].update(defaultMode=0o444)), "0440"),
        (job(lambda s, p, c: p["volumes"][2]["secret"]["items"].pop()), "certificates"),
        (job(lambda s, p, c: p.update(subdomain="x")), "names"),
        (job(lambda s, p, c: s["template"]["metadata"]["labels"].clear()), "does not select"),
        (job(lambda s, p, c: c["livenessProbe"]["grpc"].update(service="readiness")), "liveness"),
        (job(lambda s, p, c: c["startupProbe"]["grpc"].update(port=1)), "asks port 1"),
        (job(lambda s, p, c: c.pop("readinessProbe")), "has no readinessProbe"),
        (job(lambda s, p, c: replace(c, "/data/state", "/state")), "--state-dir"),
        (job(lambda s, p, c: replace(c, "job.toml", "other.toml")), "no such file"),
        (job(lambda s, p, c: replace(c, ":7421", ":7420")), "port coordinator"),
        (job(lambda s, p, c: replace(c, "{}.halfstep", "{}")), "--peers"),
        (job(lambda s, p, c: s.update(backoffLimitPerIndex=6)), "for ever"),
        (lambda objects: [t["data"].update({"job.toml": "output = 'out'"}) for t in objects if "data" in t], "output out"),
        (without("ServiceAccount"), "service account"),
        (without("PersistentVolumeClaim"), "no claim"),
        (without("ConfigMap"), "no config map"),
        (without("NetworkPolicy"), "no network policy"),
        (without("Job"), "no Job"),
        (service(lambda s: s.pop("clusterIP")), "before they are ready"),
        (service(lambda s: s["ports"][0].update(targetPort="x")), "called x"),
        (policy(lambda s: s["policyTypes"].pop()), "direction"),
        (policy(lambda s: s["ingress"].pop()), "reach port metrics"),
        (policy(lambda s: s["egress"].pop(0)), "call port"),
    ]


def found_mistakes(base):
    for number, (spoil, word) in enumerate(mistakes()):
        spoiled = copy.deepcopy(base)
        spoil(spoiled)
        problems = rules.problems(spoiled)
        if not any(word in problem for problem in problems):
            yield f"mistake {number}: expected a finding with `{word}`, found {problems}"


def schemas_of_values(report):
    loaded = helm.Chart.load(str(CHART))
    for values in GOOD_VALUES:
        # A claim of one's own is nowhere in the chart.
        strange = (problem for problem in rules.problems(chart(values)) if not problem.endswith("no claim mine"))
        report.check(f"values {values}", strange)
        for version in VERSIONS:
            report.check(f"values {values}, Kubernetes {version}", schema_problems(chart(values), version))
    for values in BAD_VALUES:
        try:
            loaded.validate_schema(values)
            report.check(f"values {values}", ["expected to be refused, were not"])
        except helm.HelmError:
            report.check(f"values {values}", [])


def lint(report):
    told = helm.lint(str(CHART), strict=True)
    report.check("helm lint", (m["error"] for m in told["messages"] if m["severity"] > 1))
    # Beside the interpreter, where pip puts it.
    linter = shutil.which("hadolint", path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]))
    done = subprocess.run([linter or "hadolint", str(HERE / "Dockerfile")], capture_output=True, text=True)
    report.check("hadolint", [] if done.returncode == 0 else [done.stdout + done.stderr])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--halfstep", required=True, help="the binary whose arguments the manifests use")
    binary = parser.parse_args().halfstep
    report = Report()
    rendered = {folder: kustomize(folder) for folder in OVERLAYS}
    for folder, objects in rendered.items():
        for version in VERSIONS:
            report.check(f"{folder}, Kubernetes {version}", schema_problems(objects, version))
        report.check(f"{folder}, rules", rules.problems(objects))
        report.check(f"{folder}, arguments", argument_problems(objects, binary))
        report.check(f"{folder}, job.toml", job_file_problems(objects, binary))
    for values, folder in TWINS:
        pairs = differences(normal(chart(values)), normal(rendered[folder]))
        report.check(f"chart with {values or 'defaults'} and {folder}", pairs)
    report.check("mistakes made on purpose", found_mistakes(rendered["base"]))
    schemas_of_values(report)
    lint(report)
    print(f"{report.passed} passed, {report.failed} failed")
    sys.exit(report.failed > 0)


if __name__ == "__main__":
    main()
