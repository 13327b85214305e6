"""The hostile corpus: damaged and hostile checkpoints of every format, each of which must be refused in our words.

`case` says what a case is and which rules there are, `bases` makes the valid checkpoints, one module for each container
damages them, `corpus` is the table of all, and `examination` is what a user does with a checkpoint, from opening to
converting.
"""
