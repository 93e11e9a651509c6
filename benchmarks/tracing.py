"""Time and memory of tracing published networks from shapes: one fresh process per network.

Run ``python benchmarks/tracing.py`` from the repository; name networks of the zoo to choose.
"""

import multiprocessing
import resource
import sys
import time
from pathlib import Path

NETWORKS = ("vgg16", "resnet18", "resnet50", "transformer-1.5b")


def measure(name, results):
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from zoo import FULL_SIZE

    import pathcond_jax as pathcond

    network = FULL_SIZE[name]()
    wall, cpu = time.perf_counter(), time.process_time()
    spec = pathcond.trace_spec(network.apply_fn, network.params, network.x)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    results.put((spec.num_parameters, spec.num_neurons, wall, cpu, memory))


def main():
    context = multiprocessing.get_context("spawn")
    print("network              parameters   neurons  wall [s]  CPU [s]  peak RSS [GB]")
    for name in sys.argv[1:] or NETWORKS:
        results = context.SimpleQueue()
        process = context.Process(target=measure, args=(name, results))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)
        parameters, neurons, wall, cpu, memory = results.get()
        print(f"{name:18} {parameters:12,} {neurons:9,} {wall:9.1f} {cpu:8.1f} {memory:14.2f}")


if __name__ == "__main__":
    main()
