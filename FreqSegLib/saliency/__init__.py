"""Where in a picture a text is: bottlenecks, the gate in front of them, and frequency branches."""
