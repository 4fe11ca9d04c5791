"""What a quantized weight is: its formats, their values and checks, and their JSON."""
