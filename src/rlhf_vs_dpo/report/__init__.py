"""The answer a reader came for, as one page: what each method gains, what it costs, where it breaks, how sure we are.

`results.json` of the `evaluate` stage holds all numbers. `content` says them, as blocks; `page` and `markdown` write the
blocks down; `python -m rlhf_vs_dpo.report evaluation/results.json` prints the table alone.
"""
