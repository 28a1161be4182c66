"""Small faults put into the code one at a time, each judged by the tests that run its line; what survives is listed.

`make mutants ARGS="--sample 100 train pipeline/latents"` (rooms or files) or ARGS="--since origin/main" (what changed).
The map from lines to tests takes about twice as long as `make test`; remove .mutants/ to make it anew.
"""

# fmt: off
# ruff: noqa: E401, I001
import argparse, ast, collections, copy, itertools, json, os, random, re, shutil, subprocess, sys, time
from pathlib import Path
ROOT = Path(__file__).parent.parent
KEPT, MOST_SECONDS = ROOT / ".mutants", 60  # of tests for one fault, the quickest first
SWAPS = {"Lt": "LtE", "Gt": "GtE", "Eq": "NotEq", "In": "NotIn", "Is": "IsNot", "Add": "Sub", "Mult": "Div", "And": "Or"}
SWAPS |= {new: old for old, new in SWAPS.items()} | {"FloorDiv": "Mult", "Mod": "Mult", "Pow": "Mult"}
RC = "[run]\nsource = pipeline, extract, train, sample\nparallel = true\npatch = subprocess\nrelative_files = true\n"
NAMES_TESTS = "import os\ndef pytest_runtest_setup(item):\n    os.environ['COVERED_BY'] = item.nodeid\n"

def faulty(node):
    """(kind of fault, what stands instead) for every small fault of an expression or a statement."""
    swap = lambda operator: getattr(ast, SWAPS.get(type(operator).__name__, type(operator).__name__))()  # noqa: E731
    changed, value = copy.deepcopy(node), getattr(node, "value", None)
    if isinstance(node, ast.Compare):
        changed.ops = [swap(node.ops[0]), *node.ops[1:]]
        yield "comparison", changed
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op).__name__ in SWAPS:
        changed.op = swap(node.op)
        yield "operator", changed
        yield from (("operand", kept) for kept in getattr(node, "values", []))
    elif isinstance(node, ast.Constant) and type(value) in {bool, int, float}:
        yield "constant", ast.Constant(not value if isinstance(value, bool) else value + 1)
    elif isinstance(node, ast.Call):
        for gone in node.keywords:
            yield "keyword", ast.Call(node.func, node.args, [kept for kept in node.keywords if kept is not gone])
    elif isinstance(node, ast.Expr | ast.Assign | ast.AugAssign | ast.Raise):
        defines = any(isinstance(target, ast.Name | ast.Tuple) for target in getattr(node, "targets", []))
        if not defines and not isinstance(value, ast.Constant | ast.Yield | ast.YieldFrom):
            yield "statement", ast.Pass()
def faults_of(text):
    """(line, kind, first byte, last byte, new text) of every small fault that can be put into a file."""
    starts = [0, *(match.end() for match in re.finditer(b"\n", text.encode()))]
    def span(node):
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
    def visit(node):
        if isinstance(node, ast.With) and not any(item.optional_vars for item in node.items):
            yield node.lineno, "with", span(node)[0], starts[node.body[0].lineno - 1] - 1, "if True:"
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            yield node.test.lineno, "condition", *span(node.test), f"(not ({ast.unparse(node.test)}))"
        for kind, new in faulty(node):
            written = ast.unparse(ast.fix_missing_locations(new))
            yield node.lineno, kind, *span(node), written if kind == "statement" else f"({written})"
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                is_code = isinstance(child, ast.AST) and field not in {"annotation", "returns"}
                if is_code and not isinstance(child, ast.JoinedStr | ast.expr_context | ast.operator):
                    yield from visit(child)
    return list(visit(ast.parse(text)))
def lines_and_tests():
    """({file: {line: tests}}, {test or file of tests: seconds of its own or of its fixtures}) from one run of the tests."""
    if not (KEPT / "map.json").exists():
        KEPT.mkdir(exist_ok=True)
        (KEPT / "names_tests.py").write_text(NAMES_TESTS)
        (KEPT / "rc").write_text(f"{RC}context = ${{COVERED_BY-}}\ndata_file = {KEPT}/data\n")
        tests = f"-qvv -n2 --dist=loadscope -p names_tests --durations=0 --cov --cov-config={KEPT}/rc --cov-context=test"
        run = [sys.executable, "-m", "pytest", *tests.split(), "--cov-report=", "-mnot slow and not gpu"]
        env = os.environ | {"PYTHONPATH": f"{ROOT}:{KEPT}", "OMP_NUM_THREADS": "1"}
        shown = subprocess.run(run, check=False, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True).stdout
        report = f"{sys.executable} -m coverage json --rcfile={KEPT}/rc --show-contexts -q -o{KEPT}/cov.json"
        subprocess.run(report.split(), cwd=ROOT, check=True)
        taken = collections.defaultdict(float)
        for took, part, test, file in re.findall(r"^([\d.]+)s (call|setup) +((\S+?)::.*)$", shown, flags=re.MULTILINE):
            taken[test if part == "call" else file] += float(took)
        files = {file: found["contexts"] for file, found in json.loads((KEPT / "cov.json").read_text())["files"].items()}
        (KEPT / "map.json").write_text(json.dumps([files, taken]))
    contexts, seconds = json.loads((KEPT / "map.json").read_text())
    tests_of = lambda names: {name.partition("|")[0] for name in names} - {""}  # noqa: E731
    lines = {file: {int(line): tests_of(names) for line, names in found.items()} for file, found in contexts.items()}
    return lines, seconds
def begun(fault, tests, tree):
    """The process that runs the tests with the fault in a copy of the tree: its number, which is its group's too."""
    (file, _, _, first, last, new), raw = fault, (ROOT / fault[0]).read_bytes()
    (tree / file).write_bytes(raw[:first] + new.encode() + raw[last:])
    if child := os.fork():  # of the main thread of a process that has imported the heavy libraries
        return child
    status = 70  # no answer of the tests
    try:
        _ = os.setsid(), os.chdir(tree)
        sys.path[0] = os.environ["PYTHONPATH"] = str(tree)
        for stream in (0, 1, 2):
            os.dup2(os.open(tree / "said" if stream else os.devnull, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
        words, run = ["-xq", "-pno:cacheprovider", "-Wignore::pytest.PytestAssertRewriteWarning"], sys.modules["pytest"].main
        parts = filter(None, (tests[:6], tests[6:]))  # most faults are noticed by the first few: the rest is not imported
        status = next((int(code) for part in parts if (code := run([*words, *part]))), 0)
    finally:
        os._exit(status)
def verdicts(faults, tests_of):
    """(fault, "killed", "timeout" (noticed too) or "survived") of each, two at a time, as they are known."""
    waiting, free, running = list(faults), [KEPT / "tree0", KEPT / "tree1"], {}
    for tree in free:
        shutil.copytree(ROOT, tree, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "demo", "__pycache__"))
    while waiting or running:
        while waiting and free:
            fault, tree = waiting.pop(0), free.pop()
            tests, seconds = tests_of(fault)
            running[begun(fault, tests, tree)] = (fault, tree, time.monotonic() + 60 + 5 * seconds)
        time.sleep(0.05)
        for child, (fault, tree, end) in list(running.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if not done and time.monotonic() < end:
                continue
            subprocess.run(["kill", "-9", "--", f"-{child}"], check=False, capture_output=True)  # with all it started
            _ = done or os.waitpid(child, 0), (tree / fault[0]).write_bytes((ROOT / fault[0]).read_bytes())
            if (code := os.waitstatus_to_exitcode(status) if done else None) in {3, 5, 70}:
                raise SystemExit(f"{fault[0]}:{fault[1]}: its tests could not be run: {(tree / 'said').read_text()}")
            free.append(running.pop(child)[1])
            yield fault, "timeout" if code is None else "killed" if code else "survived"
def changed_lines(since):
    found, file = set(), ""
    for line in subprocess.check_output(["git", "diff", "-U0", since, "--", "*.py"], cwd=ROOT, text=True).splitlines():
        file = line[6:] if line.startswith("+++ b/") else file
        if match := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            found |= {(file, k) for k in range(int(match[1]), int(match[1]) + int(match[2] or 1))}
    return found
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=["pipeline", "extract", "train", "sample"])
    parser.add_argument("--since", help="only lines that differ from this commit")
    _ = [parser.add_argument(flag, type=int, default=number) for flag, number in (("--sample", 50), ("--seed", 0))]
    options, (lines, seconds) = parser.parse_args(), lines_and_tests()
    inside = (file for file in sorted(lines) if any(Path(file).is_relative_to(path) for path in options.paths))
    faults = [(file, *fault) for file in inside for fault in faults_of((ROOT / file).read_text())]
    changed = changed_lines(options.since) if options.since else {fault[:2] for fault in faults}
    faults = [fault for fault in faults if fault[:2] in changed and lines[fault[0]].get(fault[1])]
    chosen = random.Random(options.seed).sample(faults, min(options.sample, len(faults)))
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    _ = [__import__(heavy) for heavy in ("torch", "diffusers", "accelerate", "scipy.linalg", "pytest")]
    def tests_of(fault):
        takes = lambda test: seconds.get(test, 0.0) + seconds.get(test.partition("::")[0], 0.0)  # noqa: E731
        quickest = sorted(lines[fault[0]][fault[1]], key=takes)
        totals = list(itertools.accumulate(seconds.get(test, 0.0) for test in quickest))
        return quickest[: max(1, sum(total <= MOST_SECONDS for total in totals))], min(totals[-1], MOST_SECONDS)
    judged = []
    for (file, line, kind, first, last, new), verdict in verdicts(chosen, tests_of):
        judged.append((file, verdict))
        was = " ".join((ROOT / file).read_bytes()[first:last].decode().split())
        print(f"{len(judged)}: {verdict}: {file}:{line} {kind}: {was[:80]} -> {new[:80]}", flush=True)
    for area in ["", *sorted({str(Path(fault[0]).parent) for fault in chosen})]:
        noticed = [verdict != "survived" for file, verdict in judged if Path(file).is_relative_to(area)]
        print(f"{sum(noticed)} of {len(noticed)} faults noticed in {area or 'all'}")
if __name__ == "__main__":
    main()
