"""How good the masks are: metrics, labelled cases, and the table ``freqseg evaluate`` prints."""
