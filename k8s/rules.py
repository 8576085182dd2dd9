"""What a schema does not know of a manifest, but the API server, the kubelet or the binary will refuse or suffer from.

problems(objects) takes the objects of one rendering, as YAML gives them, and returns one sentence for each mistake.
Not here: schemas, rendering, the command line of the binary (check.py).
"""

import re
import tomllib

# Secrets that people make by hand, as docs/kubernetes.md says.
SECRETS_BY_HAND = {"halfstep-certs"}
FAILURES_MAX_DEFAULT = 20
HEALTH_SERVICES = {"startupProbe": "startup", "readinessProbe": "readiness", "livenessProbe": "liveness"}
VOLUMES_OF_RESTRICTED = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def jobs_of(objects):
    """Name, spec and name of the coordinator's kind of every Job, also those inside a JobSet."""
    for thing in objects:
        if thing["kind"] == "Job":
            yield thing["metadata"]["name"], thing["spec"]
        if thing["kind"] == "JobSet":
            for job in thing["spec"]["replicatedJobs"]:
                yield f'{thing["metadata"]["name"]}/{job["name"]}', job["template"]["spec"]


def option(arguments, name, default=None):
    """The value of --name=value."""
    found = [argument.split("=", 1)[1] for argument in arguments if argument.startswith(f"--{name}=")]
    return found[-1] if found else default


def port_of(address):
    return int(address.rsplit(":", 1)[1])


def problems(objects):
    found = []
    for name, spec in jobs_of(objects):
        pod = spec["template"]["spec"]
        rules = [counts, failures, success, mounts, stopping, security, references, network, probes, binary]
        for rule in rules:
            found += [f"{name}: {problem}" for problem in rule(spec, pod, objects)]
    if not any(jobs_of(objects)):
        found.append("no Job at all")
    return found


def counts(spec, pod, objects):
    if spec.get("completionMode") != "Indexed":
        yield "completionMode is not Indexed: pods would have no index"
    if spec["completions"] != spec["parallelism"]:
        yield f'completions {spec["completions"]} and parallelism {spec["parallelism"]} differ: scaling takes both alike'
    if spec.get("maxFailedIndexes", 0) > spec["completions"]:
        yield f'maxFailedIndexes {spec["maxFailedIndexes"]} is more than completions {spec["completions"]}'
    if "maxFailedIndexes" in spec and "backoffLimitPerIndex" not in spec:
        yield "maxFailedIndexes without backoffLimitPerIndex"


def failures(spec, pod, objects):
    policy = spec.get("podFailurePolicy")
    if policy is None:
        return
    if pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy takes restartPolicy Never"
    if spec.get("podReplacementPolicy", "Failed") != "Failed":
        yield "podFailurePolicy takes podReplacementPolicy Failed"
    containers = {container["name"] for container in pod["containers"]}
    for rule in policy["rules"]:
        for condition in rule.get("onPodConditions", []):
            if condition.get("status") != "True":
                yield f'condition {condition["type"]} has no status "True", required before 1.34'
        codes = rule.get("onExitCodes")
        if codes is None:
            continue
        if codes.get("containerName") not in containers:
            yield f'podFailurePolicy names container {codes.get("containerName")}, which there is not'
        values = codes["values"]
        if values != sorted(set(values)) or (codes["operator"] == "In" and 0 in values):
            yield f"exit codes {values}: expected each once, ascending, without 0"
        if rule["action"] == "FailJob" and (75 in values or 1 in values):
            yield "exit codes 1 and 75 are tried again, never the end of the Job"


def success(spec, pod, objects):
    for rule in spec.get("successPolicy", {}).get("rules", []):
        for part in rule.get("succeededIndexes", "").split(","):
            last = int(part.split("-")[-1]) if part else 0
            if last >= spec["completions"]:
                yield f"successPolicy names index {last}, completions are {spec['completions']}"


def mounts(spec, pod, objects):
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    mounted = set()
    for container in pod["containers"]:
        places = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        if len(places) != len(set(places)):
            yield f"two mounts at one path: {places}"
        for mount in container.get("volumeMounts", []):
            mounted.add(mount["name"])
            if mount["name"] not in volumes:
                yield f'mount {mount["mountPath"]}: there is no volume {mount["name"]}'
    for unused in sorted(volumes - mounted):
        yield f"volume {unused} is mounted nowhere"


def stopping(spec, pod, objects):
    grace = pod.get("terminationGracePeriodSeconds", 30)
    for container in pod["containers"]:
        sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        # A pod hands its work back within five seconds.
        if sleep + 5 >= grace:
            yield f"preStop sleeps {sleep} s, which leaves no time of the grace of {grace} s to hand work back"
    for key in ["not-ready", "unreachable"]:
        tolerated = [t for t in pod.get("tolerations", []) if t.get("key") == f"node.kubernetes.io/{key}"]
        if [t.get("tolerationSeconds") for t in tolerated] != [30]:
            yield f"a node that is {key} is not given up after 30 s"


def security(spec, pod, objects):
    """PodSecurity restricted, and no token."""
    context = pod.get("securityContext", {})
    if not context.get("runAsNonRoot") or context.get("runAsUser", 0) == 0:
        yield "may run as root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile RuntimeDefault"
    if pod.get("automountServiceAccountToken") is not False:
        yield "gets a token of its service account"
    for space in ["hostNetwork", "hostPID", "hostIPC"]:
        if pod.get(space):
            yield f"uses {space}"
    for volume in pod.get("volumes", []):
        kinds = set(volume) - {"name"}
        if not kinds <= VOLUMES_OF_RESTRICTED:
            yield f'volume {volume["name"]} is of a kind that restricted pods may not have: {sorted(kinds)}'
    for container in pod["containers"]:
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield "may gain privileges"
        if context.get("readOnlyRootFilesystem") is not True:
            yield "can write to its image"
        capabilities = context.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"]:
            yield "keeps capabilities"
        rdma = "rdma/hca" in container["resources"]["limits"]
        if set(capabilities.get("add", [])) - ({"IPC_LOCK"} if rdma else set()):
            yield f'adds capabilities {capabilities["add"]}'


def references(spec, pod, objects):
    """What is named is there."""
    there = {(thing["kind"], thing["metadata"]["name"]) for thing in objects}
    secrets = SECRETS_BY_HAND | {thing["spec"]["secretName"] for thing in objects if thing["kind"] == "Certificate"}
    if ("ServiceAccount", pod.get("serviceAccountName")) not in there:
        yield f'there is no service account {pod.get("serviceAccountName")}'
    for volume in pod.get("volumes", []):
        if "secret" in volume and volume["secret"]["secretName"] not in secrets:
            yield f'nobody makes the secret {volume["secret"]["secretName"]}'
        if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in there:
            yield f'there is no config map {volume["configMap"]["name"]}'
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim and ("PersistentVolumeClaim", claim) not in there:
            yield f"there is no claim {claim}"


def network(spec, pod, objects):
    labels = spec["template"]["metadata"]["labels"].items()
    ports = {port["name"] for container in pod["containers"] for port in container.get("ports", [])}
    numbers = {port["containerPort"] for container in pod["containers"] for port in container.get("ports", [])}
    for thing in objects:
        if thing["kind"] == "Service":
            if not thing["spec"]["selector"].items() <= labels:
                yield f'service {thing["metadata"]["name"]} does not select the pods'
            if thing["metadata"]["name"] != pod.get("subdomain"):
                yield f'subdomain {pod.get("subdomain")} is not the service {thing["metadata"]["name"]}: pods have no names'
            if thing["spec"].get("clusterIP") != "None" or not thing["spec"].get("publishNotReadyAddresses"):
                yield "the service gives pods no names of their own before they are ready"
            for port in thing["spec"]["ports"]:
                if port["targetPort"] not in ports:
                    yield f'service port {port["name"]}: no container port is called {port["targetPort"]}'
        if thing["kind"] == "NetworkPolicy":
            if not thing["spec"]["podSelector"]["matchLabels"].items() <= labels:
                yield "the network policy does not select the pods"
            if sorted(thing["spec"]["policyTypes"]) != ["Egress", "Ingress"]:
                yield "the network policy leaves a direction open"
            outward = {port["port"] for rule in thing["spec"]["egress"] for port in rule["ports"]}
            inward = {port["port"] for rule in thing["spec"]["ingress"] for port in rule["ports"]}
            for port in {"coordinator", "node", "metrics"} & ports - inward:
                yield f"the network policy lets nobody reach port {port}"
            for port in {7421, 7422} & numbers - outward:
                yield f"the network policy lets no pod call port {port}"
    if not any(thing["kind"] == "NetworkPolicy" for thing in objects):
        yield "there is no network policy"


def probes(spec, pod, objects):
    for container in pod["containers"]:
        health = option(container["args"], "health")
        for kind, service in HEALTH_SERVICES.items():
            probe = container.get(kind, {}).get("grpc")
            if probe is None:
                yield f"has no {kind}"
            elif health is None or probe["port"] != port_of(health):
                yield f'{kind} asks port {probe["port"]}, health is at {health}'
            elif probe.get("service") != service:
                yield f'{kind} asks for service {probe.get("service")}, expected {service}'


def binary(spec, pod, objects):
    """What the arguments say fits the pod."""
    maps = {thing["metadata"]["name"]: thing["data"] for thing in objects if thing["kind"] == "ConfigMap"}
    for container in pod["containers"]:
        arguments = container["args"]
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}

        def volume_of(path):
            above = [place for place in mounted if path == place or path.startswith(place + "/")]
            return volumes.get(mounted[max(above, key=len)], {}) if above else {}

        for name, kind in [("config", "configMap"), ("state-dir", "persistentVolumeClaim"), ("certs", "secret"), ("spill-dir", "emptyDir")]:
            path = option(arguments, name)
            if path is not None and kind not in volume_of(path):
                yield f"--{name}={path} lies on no volume of kind {kind}"
        config = option(arguments, "config")
        if config is not None:
            content = maps.get(volume_of(config).get("configMap", {}).get("name"), {})
            if config.rsplit("/", 1)[1] not in content:
                yield f"--config={config}: the config map has no such file"
            job = tomllib.loads(content.get(config.rsplit("/", 1)[1], ""))
            for key in ["model", "calibration", "output"]:
                if "persistentVolumeClaim" not in volume_of(job.get(key, "/data")):
                    yield f"job.toml: {key} {job[key]} does not lie on the claim"
        yield from certificates(arguments, volume_of(option(arguments, "certs", "/")))
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port, name in [("coordinator", "listen"), ("node", "serve"), ("health", "health"), ("metrics", "metrics")]:
            address = option(arguments, name)
            if port in ports and (address is None or ports[port] != port_of(address)):
                yield f"port {port} is {ports[port]}, --{name} is {address}"
        if not re.search(r"\.%s$" % re.escape(pod.get("subdomain", "halfstep")), option(arguments, "peers", "")):
            yield "--peers names no pods of the service"
        limit = int(option(arguments, "failures-max", FAILURES_MAX_DEFAULT))
        if "backoffLimitPerIndex" in spec and limit > spec["backoffLimitPerIndex"]:
            yield f'--failures-max {limit} is more than backoffLimitPerIndex {spec["backoffLimitPerIndex"]}: pods would wait for ever'


def certificates(arguments, volume):
    """Every pair that the role needs; index 0 has two roles."""
    needed = {"ca.pem"}
    if option(arguments, "coordinator") is None:
        needed |= {"coordinator.pem", "coordinator-key.pem"}
    if "--coordinate-only" not in arguments:
        needed |= {"node.pem", "node-key.pem"}
    secret = volume.get("secret", {})
    files = {item["path"] for item in secret.get("items", [])}
    if files != needed:
        yield f"certificates {sorted(files)}, expected {sorted(needed)}"
    if secret.get("defaultMode") != 0o440:
        yield "keys are not readable by the group alone (mode 0440): the binary refuses them or cannot read them"
