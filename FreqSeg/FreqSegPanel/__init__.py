"""What the FreqSeg panel is made of: MRML on one side, the worker process on the other."""
