"""What starts rvc_dist on Kubernetes and SkyPilot, and the image: valid, and the same commands as everywhere."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import psutil
import pytest
import yaml
from helpers import make_features, tiny_recipe, with_train, workspace_of
from kubeflow_trainer_api.models import JobsetV1alpha2JobSetSpec
from launching import ROOT, environment, finish, forking_python, kill, start
from torch.distributed.run import config_from_args, parse_args

from rvc_dist.arguments import parse
from rvc_dist.stages import STAGES
from rvc_dist.train import checkpoint
from rvc_dist.workspace import Shard

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest's own dependency before 3.11

Document = dict[str, Any]
pytestmark = pytest.mark.usefixtures("thin_ranks")
FOLDER = ROOT / "launch" / "kubernetes"
IN_IMAGE = "/opt/rvc_dist"
CORE = "1.33"
"""The oldest Kubernetes that is looked at: since then `backoffLimitPerIndex` is stable."""
SKYPILOT = Path(os.environ.get("SKYPILOT", ""))
"""An environment that has SkyPilot, a program of its own: click that it wants is too old for packages of this one.
Who still installs it holds `lock` in it."""


def documents() -> dict[str, Document]:
    """Every object of launch/kubernetes by its name; the Job in a JobSet as one of its own beside it."""
    found = [each for path in sorted(FOLDER.iterdir()) for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    for job_set in [each for each in found if each["kind"] == "JobSet"]:
        for job in job_set["spec"]["replicatedJobs"]:
            head = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
            found.append(head | job["template"])
    return {each["metadata"]["name"]: each for each in found}


DOCUMENTS = documents()
JOBS = {name: each for name, each in DOCUMENTS.items() if each["kind"] == "Job"}
SKY: Document = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text(encoding="utf-8"))


def pod(job: Document) -> Document:
    found: Document = job["spec"]["template"]["spec"]
    return found


def container(job: Document) -> Document:
    (found,) = pod(job)["containers"]
    return dict(found)


def values(job: Document) -> dict[str, str]:
    """The variables of its container that have a value in the file."""
    return {each["name"]: each["value"] for each in container(job).get("env", []) if "value" in each}


# Valid


def problems(document: Document) -> str:
    """What the API server of a cluster would refuse in it."""
    if document["kind"] == "JobSet":
        # The controller's own types; what they do not know is lost on the way.
        spec = document["spec"]
        kept = JobsetV1alpha2JobSetSpec.from_dict(copy.deepcopy(spec)).to_dict()
        return "" if json.loads(json.dumps(kept)) == spec else "unknown fields"
    for version in (CORE, kubernetes_validate.latest_version()):
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            return str(error.message)
    return ""


def test_every_object_of_kubernetes_is_valid() -> None:
    assert {each["kind"] for each in DOCUMENTS.values()} == {"Job", "JobSet", "PersistentVolumeClaim", "Pod"}
    assert {name: problems(each) for name, each in DOCUMENTS.items()} == dict.fromkeys(DOCUMENTS, "")
    for name, where, key in (
        ("rvc-extract", ["spec"], "completion"),
        ("rvc-extract", ["spec", "podFailurePolicy", "rules", 0], "onExit"),
        ("node", ["spec", "template", "spec", "containers", 0], "gpus"),
        ("rvc-train", ["spec", "network"], "enableDNS"),
        ("rvc-train", ["spec", "failurePolicy"], "restarts"),
    ):
        document = inner = copy.deepcopy(DOCUMENTS[name])
        for step in where:
            inner = inner[step]
        inner[key] = 1
        assert problems(document), f"{key} in {name} is refused"


@pytest.mark.parametrize("name", JOBS)
def test_pods_may_be_ended_and_started_again(name: str) -> None:
    """What the schemas cannot say: the API of Jobs asks for it, or pods would lose what they have made."""
    job, main = JOBS[name], container(JOBS[name])
    assert pod(job)["restartPolicy"] == "Never", "podFailurePolicy is allowed with this one alone"
    assert pod(job)["securityContext"]["runAsNonRoot"]
    rules = job["spec"]["podFailurePolicy"]["rules"]
    disrupted = next(rule["action"] for rule in rules if "onPodConditions" in rule)
    if name == "meeting":
        assert (disrupted, job["spec"]["backoffLimit"]) == ("FailJob", 0), "without it nobody meets: all begin again"
        return
    assert [rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule] == [main["name"]]
    mounts = {each["mountPath"]: each["name"] for each in main["volumeMounts"]}
    volumes = {each["name"]: each for each in pod(job)["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"] in DOCUMENTS
    patience_s = re.search(r"PATIENCE_S:-(\d+)", (ROOT / "launch" / "node.sh").read_text(encoding="utf-8"))
    assert patience_s is not None
    if name in ("node", "worker"):
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert pod(job)["terminationGracePeriodSeconds"] > int(patience_s[1]) + 10
        assert rules[0]["onExitCodes"]["values"] == [75] == SKY["resources"]["job_recovery"]["recover_on_exit_codes"]
    if name == "worker":
        assert rules[0]["action"] == "Ignore", "a pod that saved and left is replaced"
    if name != "node":
        assert disrupted == "Ignore"
        return
    # All pods begin again together, and being asked to stop is no failure: exit codes of Jobs do not reach a JobSet.
    job_set = DOCUMENTS["rvc-train"]["spec"]
    (rule,) = job_set["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    assert job_set["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    assert [rule["action"] for rule in rules] == ["FailJob", "FailJob"]
    assert job["spec"]["backoffLimit"] == 0


@pytest.mark.skipif("SKYPILOT" not in os.environ, reason="SKYPILOT names no environment that has it")
def test_skypilot_parses_its_task(tmp_path: Path) -> None:
    """With a HOME of its own, where it keeps a state."""
    if not (SKYPILOT / "bin" / "sky").exists():
        pytest.skip(f"SkyPilot could not be installed in {SKYPILOT}")
    script = (
        "import sky, sys\n"
        "task = sky.Task.from_yaml(sys.argv[1])\n"
        "(asked,) = task.resources\n"
        "print(task.num_nodes, asked.use_spot, asked.job_recovery, asked.accelerators, sep='\\n')\n"
        "print({path: (mount.mode.value, mount.source) for path, mount in task.storage_mounts.items()})\n"
    )
    silent = {k: v for k, v in environment().items() if k != "PYTHONPATH"} | {
        "HOME": str(tmp_path),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    }

    def parsed(path: Path) -> subprocess.CompletedProcess[str]:
        command = [str(SKYPILOT / "bin" / "python"), "-c", script, str(path)]
        return subprocess.run(command, env=silent, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)

    done = parsed(ROOT / "launch" / "sky.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    num_nodes, use_spot, recovery, accelerators, mounts = done.stdout.splitlines()[-5:]
    assert (num_nodes, use_spot, accelerators) == ("1", "True", "{'A100': 8}")
    assert "'recover_on_exit_codes': [75]" in recovery
    assert mounts == str(
        {"/audio": ("MOUNT", "s3://YOUR-BUCKET/audio"), "/runs": ("MOUNT_CACHED", "s3://YOUR-BUCKET/runs")}
    )
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(SKY | {"file_mount": {}}))
    assert parsed(wrong).returncode != 0


def test_the_image_has_what_the_jobs_start() -> None:
    done = subprocess.run(
        ["hadolint", "--format", "tty", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^FROM \S+:\d+\.\d+\.\d+-\S+$", text, re.M), "by a tag that stays what it is"
    assert re.search(r"^USER (\d+)$", text, re.M)[1] == str(pod(JOBS["node"])["securityContext"]["runAsUser"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = re.search(rf'"{IN_IMAGE}\[([\w,]+)\]"', text)
    assert wanted is not None
    assert set(wanted[1].split(",")) <= set(project["project"]["optional-dependencies"])
    # What hatchling reads, and what is started, is in the context; nothing else is.
    _, *rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    sent = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    built = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert sent == {
        *built["packages"],
        *built["force-include"],
        project["project"]["readme"],
        "pyproject.toml",
        "LICENSE",
    }
    assert all((ROOT / name).exists() for name in sent)


# The same commands


def test_jobs_give_commands_that_rvc_dist_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("name: my_voice\n")
    stages = {}
    for name, job in JOBS.items():
        main = container(job)
        if name == "meeting":
            assert parse(main["args"][0], main["args"][1:])[2]["meeting_point"]
            continue
        shell, script, dashes, stage, *words = [*main["command"], *main["args"]]
        assert (shell, dashes) == ("bash", "--")
        assert (ROOT / Path(script).relative_to(IN_IMAGE)).is_file()
        stages[name] = stage
        if "--shard" not in words:
            parse(stage, words)
            continue
        assert job["spec"]["completionMode"] == "Indexed"
        count = job["spec"]["completions"]
        parts = [
            parse(stage, [word.replace("$(JOB_COMPLETION_INDEX)", str(i)) for word in words])[1] for i in range(count)
        ]
        assert parts == [Shard(i, count, array=True) for i in range(count)], "each shard once"
    data = {"rvc-preprocess": "preprocess", "rvc-extract": "extract", "rvc-index": "index"}
    assert stages == data | {"node": "run", "worker": "run"}
    assert all(STAGES[stage].reads for stage in stages.values())


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH whose python shows the ranks that it is to start instead of starting them."""
    show = f'[[ $1 == -c ]] && exec {sys.executable} "$@"; printf "%s\\n" "$OMP_NUM_THREADS" "$@"'
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f"#!/usr/bin/env bash\n{show}\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


def clean(**variables: object) -> dict[str, str]:
    """An environment in which no scheduler has started this process."""
    kept = {k: v for k, v in environment().items() if not k.startswith(("SLURM_", "SKYPILOT_"))}
    return {k: v for k, v in kept.items() if k != "OMP_NUM_THREADS"} | {k: str(v) for k, v in variables.items()}


def shown(script: str, folder: Path, **variables: object) -> list[str]:
    """The threads of a rank, and the words after `python`."""
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(
        command, cwd=folder, env=clean(**variables), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


KUBERNETES = values(JOBS["node"]) | {"HEAD_ADDR": "rvc-train-node-0-0.rvc-train", "CPUS": "32", "RANKS": "8"}
ON_SKY = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_TASK_ID": "sky-7",
    "RANKS": "8",
}
BY_SLURM = {
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_ID": "7",
    "HEAD_ADDR": "10.0.0.1",
    "HEAD_PORT": "10007",
    "RANKS": "8",
}
NODE_SH = f"bash {ROOT}/launch/node.sh -- run --config my.yaml"


@pytest.mark.parametrize(
    ("script", "variables", "rank_variable", "endpoint", "run_id"),
    [
        (NODE_SH, KUBERNETES, "JOB_COMPLETION_INDEX", "rvc-train-node-0-0.rvc-train:29500", "none"),
        (SKY["run"], ON_SKY | {"RECIPE": "my.yaml"}, "SKYPILOT_NODE_RANK", "10.0.0.1:29500", "sky-7"),
        (NODE_SH, BY_SLURM, "SLURM_NODEID", "10.0.0.1:10007", "7"),
    ],
    ids=["kubernetes", "sky", "slurm"],
)
@pytest.mark.parametrize("node_rank", [0, 1])
def test_ranks_are_started_alike_everywhere(
    script: str,
    variables: dict[str, str],
    rank_variable: str,
    endpoint: str,
    run_id: str,
    node_rank: int,
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torchrun itself makes of the words: two nodes of eight ranks each, of which the first holds the meeting."""
    (tmp_path / "my.yaml").write_text("name: my_voice\n")
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    threads, *words = shown(script, tmp_path, PATH=path, **variables | {rank_variable: str(node_rank)})
    assert words[:2] == ["-m", "torch.distributed.run"]
    arguments = parse_args(words[2:])
    config, _, command = config_from_args(arguments)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (2, 2, 8, 3)
    assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == ("c10d", endpoint, run_id)
    assert config.rdzv_configs["is_host"] == str(node_rank == 0).lower()
    stage, *rest = command[command.index("rvc_dist") + 1 :]
    monkeypatch.chdir(tmp_path)
    recipe, shard, _ = parse(stage, rest)
    assert (stage, recipe.name, shard.count) == ("run", "my_voice", 1)
    if rank_variable == "SKYPILOT_NODE_RANK":
        assert (recipe.run_dir, recipe.data.audio_dir) == ("/runs/my", "/audio")
    if "CPUS" in variables:
        assert threads == "4", "32 processors of 8 ranks, however many the machine has"


def test_a_jobset_says_how_many_pods_it_has() -> None:
    for name, nodes in (("node", "{}"), ("worker", "1:{}")):
        spec = JOBS[name]["spec"]
        assert values(JOBS[name])["NODES"] == nodes.format(spec["parallelism"]) == nodes.format(spec["completions"])
    for name, first in (("rvc-train", "node"), ("rvc-train-elastic", "meeting")):
        spec = DOCUMENTS[name]["spec"]
        assert spec["coordinator"]["replicatedJob"] == first
        assert first in [each["name"] for each in spec["replicatedJobs"]]


def test_nodes_that_come_and_go_are_launched_as_by_hand(path: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("name: my_voice\n")
    elastic = KUBERNETES | values(JOBS["worker"]) | {"HEAD_ADDR": "meeting"}
    threads, *words = shown(NODE_SH, tmp_path, PATH=path, **elastic)
    launch = "-m rvc_dist launch --nodes 1:4 --cpu 8 --main_ip meeting --main_port 29500 -- run --config my.yaml"
    assert (threads, words) == ("4", shlex.split(launch))


def test_one_node_needs_no_address(path: str, tmp_path: Path) -> None:
    """A data stage's pod: its index is a shard, no rank of a node."""
    script = f"bash {ROOT}/launch/node.sh -- extract --config my.yaml --shard 5/8"
    words = shown(script, tmp_path, PATH=path, RANKS=1, JOB_COMPLETION_INDEX=5)[1:]
    assert words == shlex.split("-m rvc_dist extract --config my.yaml --shard 5/8")
    _, *words = shown(script, tmp_path, PATH=path, RANKS=4, JOB_COMPLETION_INDEX=5)
    config, _, _ = config_from_args(parse_args(words[2:]))
    assert (config.min_nodes, config.nproc_per_node, config.rdzv_configs["is_host"]) == (1, 4, "true")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NODES": "2"}, "node.sh: 2 nodes, but HEAD_ADDR is not set"),
        ({"RECIPE": "none.yaml"}, "none.yaml does not exist"),
    ],
)
def test_what_lacks_is_named_before_ranks_start(
    variables: dict[str, str], said: str, path: str, tmp_path: Path
) -> None:
    recipe = variables.get("RECIPE", "my.yaml")
    command = ["bash", str(ROOT / "launch" / "node.sh"), "--", "run", "--config", recipe]
    env = clean(PATH=path, RANKS=1, **variables)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


# Being asked to stop


@pytest.mark.parametrize(
    ("before", "during", "code"),
    [("", "", 0), ("stale", "", 0), ("", "touch {}", 75), ("", "touch {}; exit 1", 1)],
)
def test_an_exit_code_says_whether_the_run_is_to_go_on(before: str, during: str, code: int, tmp_path: Path) -> None:
    """Kubernetes takes 0 for done; launchers end with 0 when their ranks were asked to stop."""
    (tmp_path / "my.yaml").write_text("name: v\nrun_dir: run\n")
    note = tmp_path / "run" / "requeue.json"
    note.parent.mkdir()
    if before:
        note.write_text("{}")
    (tmp_path / "bin").mkdir()
    python = f'#!/usr/bin/env bash\n[[ $1 == -c ]] && exec {sys.executable} "$@"\n{during.format(note)}\nexit 0\n'
    (tmp_path / "bin" / "python").write_text(python)
    (tmp_path / "bin" / "python").chmod(0o755)
    command = ["bash", str(ROOT / "launch" / "node.sh"), "--", "train", "--config", "my.yaml"]
    variables = clean(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", RANKS=1)
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr


LAUNCHER = """
import os, signal, sys, time
def asked(number, _):
    print(signal.Signals(number).name, flush=True)
    sys.exit(0 if number == signal.SIGUSR1 else 1)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, asked)
open("began", "w").close()
time.sleep(60)
"""


def node_with_launcher(
    tmp_path: Path, nodes: str, script: Path = ROOT / "launch" / "node.sh"
) -> subprocess.Popen[bytes]:
    """A node whose launcher writes the signals that it hears to `tmp_path`/heard, and has begun."""
    (tmp_path / "python").write_text(
        "#!/usr/bin/env bash\n"
        "[[ $1 != -c ]] || { [[ $2 == *device_count* ]] && echo 0 || echo run; exit; }\n"
        f"exec {sys.executable} -c '{LAUNCHER}'\n"
    )
    (tmp_path / "python").chmod(0o755)
    command = ["bash", str(script), "--", "train", "--config", "my.yaml"]
    variables = clean(PATH=f"{tmp_path}:{os.environ['PATH']}", NODES=nodes, HEAD_ADDR="h", RANKS=1)
    with (tmp_path / "heard").open("w") as heard_file:
        node = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=heard_file)
    while not (tmp_path / "began").exists():
        assert node.poll() is None
        time.sleep(0.05)
    return node


@pytest.mark.parametrize(
    ("nodes", "sent", "heard", "code"),
    [("1:4", "TERM", "TERM", 75), ("1:4", "USR1", "USR1", 0), ("2", "TERM", "USR1", 0)],
)
def test_term_is_for_one_of_the_nodes_that_come_and_go_and_else_for_the_run(
    nodes: str, sent: str, heard: str, code: int, tmp_path: Path
) -> None:
    """Launchers end with 0 when their run stops, and with 1 when they are ended; here no rank leaves a note."""
    node = node_with_launcher(tmp_path, nodes)
    node.send_signal(getattr(signal, f"SIG{sent}"))
    assert node.wait(60) == code
    assert (tmp_path / "heard").read_text() == f"SIG{heard}\n"


def test_a_signal_that_comes_just_before_a_node_waits_is_heard(tmp_path: Path) -> None:
    script = tmp_path / "node.sh"
    text = (ROOT / "launch" / "node.sh").read_text()
    wait = "  if [[ -z $asked_at ]]; then\n"
    assert text.count(wait) == 1
    script.write_text(text.replace(wait, f"{wait}    until [[ -e began ]]; do :; done; kill -USR1 $$\n"))
    assert node_with_launcher(tmp_path, "2", script).wait(30) == 0
    assert (tmp_path / "heard").read_text() == "SIGUSR1\n"


@pytest.fixture
def two_pods(tmp_path: Path) -> Iterator[Callable[[], list[subprocess.Popen[str]]]]:
    """Starts a training as the JobSet does, on two pods of one rank each; none outlives the test."""
    recipe = tiny_recipe(tmp_path / "run", max_steps=200)
    make_features(recipe)
    (tmp_path / "my.yaml").write_text(recipe.to_yaml())
    forking_python(tmp_path, forks_launcher=True)
    pods: list[subprocess.Popen[str]] = []
    port = 20000 + os.getpid() % 10000

    def begin() -> list[subprocess.Popen[str]]:
        for i in range(2):
            shared = {"NODES": "2", "HEAD_ADDR": "127.0.0.1", "HEAD_PORT": str(port), "RANKS": "1", "MAX_RESTARTS": "1"}
            command = ["bash", str(ROOT / "launch" / "node.sh"), "--", "train", "--config", str(tmp_path / "my.yaml")]
            mine = {"JOB_COMPLETION_INDEX": str(i), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
            pods.append(start(command, shared | mine))
        return pods[-2:]

    yield begin
    for each in pods:
        if each.poll() is None:
            for process in psutil.Process(each.pid).children(recursive=True):
                process.terminate()  # a client of a fork passes it on
            time.sleep(1)
            kill(each)
            each.communicate()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_pod_that_is_drained_stops_all_and_the_next_try_continues(
    two_pods: Callable[[], list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path / "run")
    work = workspace_of(recipe)
    pods = two_pods()
    while not (work.rank_log(0).is_file() and " step 2/200" in work.rank_log(0).read_text()):
        assert [each.poll() for each in pods] == [None, None], "they train"
        time.sleep(0.1)
    pods[1].send_signal(signal.SIGTERM)  # to the one process that a kubelet knows
    outputs = [finish(each) for each in pods]
    assert [each.returncode for each in pods] == [75, 75], outputs[0][-3000:] + outputs[1][-3000:]
    (newest,) = checkpoint.list_checkpoints(work.checkpoints_dir)
    last = int(newest.name.removeprefix("step_"))
    assert 0 < last < 200
    assert json.loads(work.requeue_file.read_text())["step"] == last
    (tmp_path / "my.yaml").write_text(with_train(recipe, max_steps=last + 2).to_yaml())
    pods = two_pods()
    outputs = [finish(each) for each in pods]
    assert [each.returncode for each in pods] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert f"continuing from step {last}," in "".join(outputs), "any pod may hold rank 0"
    assert not work.requeue_file.exists()
