"""`remit benchmark`: the paper's downstream evaluation, done by lm-evaluation-harness in processes of its own."""
