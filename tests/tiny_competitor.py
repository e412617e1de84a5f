"""A competitor that trains nothing: it prints as libraries do, holds memory, and fails when a setting says so."""

import time

from benchmarks.rounds import Ready, Worker


def main():
    worker = Worker()
    print("a library says hello", flush=True)
    rows, held = b"x" * (40 << 20), []
    worker.begin_model()
    settings = dict(entry.split("=") for entry in worker.task.settings)
    if settings.get("fails") == "at once":
        raise SystemExit("no such optimizer")

    def train():
        start = time.monotonic()
        print("epoch 1/1", flush=True)
        if settings.get("fails") == "in round 2" and held:
            raise SystemExit("out of memory")
        held.append(b"x" * (50 << 20))
        time.sleep(0.05)
        with open(worker.task.arrays, "a") as log:
            log.write(f"{start} {time.monotonic()}\n")
        return len(rows[:100]), 0.5 / len(held)

    worker.serve(train, Ready(7, {"tiny": "1.0"}))


if __name__ == "__main__":
    main()
