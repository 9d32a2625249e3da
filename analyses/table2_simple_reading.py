"""Table 2: router tuning on a task that needs no reasoning, CounterFact in the paper; the organism's is `swap`.

python analyses/table2_simple_reading.py --model organism --data swap --seeds 0 --out runs/paper
"""

from table1_router_tuning import compute

from moe_lens.paper.script import run

if __name__ == "__main__":
    run(compute, item="table2", table="tasks", tasks="swap", about=__doc__, repeats=True)
