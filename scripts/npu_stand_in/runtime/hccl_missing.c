/* Collectives of HCCL that the stand-in does not have: an error, where a generated function would claim success. */
#define NOT_THERE(name) \
    int name(void) { return 5; } /* HCCL_E_NOT_SUPPORT */
NOT_THERE(HcclAllGatherV)
NOT_THERE(HcclAlltoAll)
NOT_THERE(HcclAlltoAllV)
NOT_THERE(HcclAlltoAllVC)
NOT_THERE(HcclBatchSendRecv)
NOT_THERE(HcclRecv)
NOT_THERE(HcclReduceScatterV)
NOT_THERE(HcclScatter)
NOT_THERE(HcclSend)
