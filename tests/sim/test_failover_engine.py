"""The failover simulator's engine: what becomes of the tasks of a process that dies."""

import gc

from failover_engine import Engine, Proc, Steps
from simnode import Future


def test_a_task_of_a_dead_process_does_nothing_more() -> None:
    """Not even its `finally`, whenever the garbage collector comes."""
    engine, proc, seen = Engine(0), Proc("n1"), []

    def task() -> Steps:
        try:
            yield 10
        finally:
            seen.append("finally")

    engine.spawn(task(), proc)
    engine.step()
    proc.kill()
    while engine.step():
        gc.collect()
    gc.collect()
    assert seen == []
    engine.close()
    assert seen == ["finally"]


def test_a_task_does_not_wake_in_the_next_life_of_its_process() -> None:
    engine, proc, seen = Engine(0), Proc("n1"), []
    answer = Future()

    def task() -> Steps:
        seen.append((yield answer))

    engine.spawn(task(), proc)
    engine.step()
    proc.kill()
    proc.start()
    answer.set("late")
    while engine.step():
        pass
    assert seen == []


def test_a_task_that_lives_gets_what_it_waits_for() -> None:
    engine, proc, seen = Engine(0), Proc("n1"), []
    answer = Future()

    def task() -> Steps:
        yield 5
        seen.append((yield answer))

    engine.spawn(task(), proc)
    engine.at(20, answer.set, "here")
    while engine.step():
        pass
    assert seen == ["here"] and engine.now == 20
