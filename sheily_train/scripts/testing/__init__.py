"""Programs that try hard to break the promise: faults, a simulation, mutants, garbage."""
