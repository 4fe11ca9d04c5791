"""Starting values of low-rank updates that are taken from a weight, its inputs or its gradient.

Each method gives factors; all but EVA's belong to another base, weight - scaling * B A, in 4 bits
for QPiSSA and LoftQ. `peftkern.initialize_` applies them to a model of PEFT's.
"""
