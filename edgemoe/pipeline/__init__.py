"""The queues of compute and load. At this stage everything is resident and the serial loop is all."""
