"""What a training run costs on a machine, before it is started: parameters, memory, floating-point operations."""
