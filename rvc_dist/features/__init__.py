"""What a clip is turned into before training: pitch (`f0`) and content features (`content`)."""
