"""The scripts of tlsfuzzer that suit an echo server, with the results that tlsfuzzer.toml expects.

The environment variable TLSFUZZER names a folder with a checkout. Without it the scripts are skipped. Each conversation
of a script must pass, unless a deviation in tlsfuzzer.toml names it: then it must fail, with the error given there.
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tomllib

from server import HERE, Server, TARGET

URL = "https://github.com/tlsfuzzer/tlsfuzzer"
TIMEOUT = 240


def run(certificates, skipped):
    """Runs all scripts. Returns what failed, and appends to what was skipped."""
    with open(HERE / "tlsfuzzer.toml", "rb") as file:
        plan = tomllib.load(file)
    if not os.environ.get("TLSFUZZER"):
        skipped.append(
            f"{len(plan['script'])} scripts of tlsfuzzer: set TLSFUZZER to a checkout. To get one:\n"
            f"    git clone {URL} && git -C tlsfuzzer checkout {plan['commit']}"
        )
        return []
    checkout = pathlib.Path(os.environ["TLSFUZZER"]).resolve()
    try:
        python = make_python(checkout)
    except subprocess.CalledProcessError as error:
        return [f"tlsfuzzer: {error}"]
    failed, conversations = [], 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        works = [pool.submit(run_script, python, checkout, certificates, script) for script in plan["script"]]
        for script, work in zip(plan["script"], works):
            try:
                count, deviations, faults = work.result()
            except Exception as error:  # Whatever it is, the other scripts run on.
                count, deviations, faults = 0, 0, [str(error)]
            conversations += count
            print(f"{script['name']}: {count} conversations, {deviations} known deviations", flush=True)
            for fault in faults:
                print(f"    {fault}", flush=True)
            if faults:
                failed.append(script["name"])
    print(f"tlsfuzzer: {conversations} conversations of {len(works)} scripts", flush=True)
    return failed


def make_python(checkout):
    """A Python with the libraries that tlsfuzzer needs, in the versions that it names."""
    venv = TARGET / "conformance" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(checkout / "requirements.txt")], check=True)
    return str(venv / "bin" / "python")


def run_script(python, checkout, certificates, script):
    """Returns the numbers of conversations and known deviations, and what is not as expected."""
    path = checkout / "scripts" / f"{script['name']}.py"
    sample = script.get("sample", 0)
    with Server(certificates / "rsa.pem", certificates / "rsa.key", script.get("framing", "raw")) as server:
        command = [python, str(path), "-h", "127.0.0.1", "-p", server.port, "-n", str(sample)]
        done = subprocess.run(
            command + script.get("options", []),
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT, check=False,
        )  # fmt: skip
        server.stop()
    results = list(read_results(done.stdout))
    total = re.search(r"^TOTAL: (\d+)$", done.stdout, re.MULTILINE)
    if total is None or len(results) != int(total[1]):
        return len(results), 0, [f"its output cannot be read:\n{done.stdout[-3000:]}"]
    return compare(results, script.get("deviation", []), sample > 0)


def read_results(output):
    """Each conversation of a script's output, with its error or None."""
    # "name ...", a traceback if it failed, "OK" if not, and an empty line. One script omits the three dots.
    parts = re.split(r'^(?:(\S.*?) ?\.\.\.|("[^"]*" repeat \d+))$', output, flags=re.MULTILINE)
    for name, other, body in zip(parts[1::3], parts[2::3], parts[3::3]):
        errors = re.findall(r"^[\w.]*(?:Error|Exception|Alert)\b.*", body, re.MULTILINE)
        yield name or other, None if body.startswith("\nOK") else (errors or ["no error"])[-1]


def compare(results, deviations, is_sample):
    used, faults, known = set(), [], 0
    for name, error in results:
        deviation = next((one for one in deviations if re.fullmatch(one["conversations"], name)), None)
        if deviation is not None:
            used.add(deviation["conversations"])
        if deviation is None and error is not None:
            faults.append(f"{name}: {error}")
        if deviation is not None and error is None:
            faults.append(f"{name}: passes, and is expected to fail: {deviation['reason']}")
        if deviation is not None and error is not None:
            known += 1
            if deviation["error"] not in error:
                faults.append(f"{name}: {error}, expected {deviation['error']}")
    if not is_sample:
        for one in deviations:
            if one["conversations"] not in used:
                faults.append(f"no conversation is called {one['conversations']}")
    return len(results), known, faults
