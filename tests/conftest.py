import os

# These tests start some hundreds of processes: Python compiles what they import once, and not in each of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Nor does a check leave a process behind for the next one: what a test starts ends with it.
os.environ["STAGES_WARM"] = "0"
# Several processes work at once: each takes its share of the cores, and so does what it starts. With two threads in
# each of three processes on two cores, torch's threads waited for each other: test_bridges took 514 s instead of 18.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def pytest_xdist_auto_num_workers(config):
    """One more than cores: while one waits for a process that it has started, or for a clock, another works."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    """The longest tests come first, a stage's checkpoints each, and of these the later stages', which have more.

    Else one process works on the last of them alone.
    """
    suites = [item for item in items if item.name.startswith("test_checkpoints")]
    items[:] = [*reversed(suites), *(item for item in items if item not in suites)]
