"""Whether one model can stand in for another: ``judge`` has the verb, ``equivalence`` what ``optimize`` asks."""
