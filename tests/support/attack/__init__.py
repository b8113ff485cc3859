"""Every class of attack on a running service, with values from a seed, beside neighbours whose rows are checked.

    make attack SEED=3

`__main__` starts the service and its neighbours, has each class of attack run in a process of its own (`attacker`), and
judges: nothing wrong, nothing failed, no member lost, memory back, the neighbours' p99 bounded. A class is a function
in one of this folder's files, entered in `attacker.ATTACKS`. What needs rights, as a false report of what is held does,
is no attack here.
"""
